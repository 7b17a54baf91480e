"""Everything that runs the model: token ids and tensors in, scores out. Knows neither files nor words.

``Engine`` (base.py) is what stages call. ``SharedPrefixEngine`` (shared_prefix.py) is a thousand times faster than
``ReferenceEngine`` (reference.py), the obvious way; selfcheck.py decides between them when a model is opened. clean.py
runs prompts without interventions, answers.py scores whole answers. How numbers are computed is behind arithmetic/.
"""
