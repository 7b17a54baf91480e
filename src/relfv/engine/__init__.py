"""Everything that runs the model: token ids and tensors in, scores out. Knows neither files nor words.

``Engine`` (base.py) is what stages call; ``SharedPrefixEngine`` (shared_prefix.py) is the fast one, ``ReferenceEngine``
(reference.py) the obvious one, and selfcheck.py decides between them when a model is opened. Beside them, clean.py runs
prompts without interventions and answers.py scores whole answers. How numbers are computed is behind arithmetic/.
"""
