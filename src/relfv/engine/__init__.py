"""The head sweep and the injection: token ids and tensors in, scores out. Knows neither files nor words.

``Engine`` (base.py) is what stages call; ``SharedPrefixEngine`` (sweep.py) is the fast one, ``ReferenceEngine``
(reference.py) the obvious one, and selfcheck.py decides between them when a model is opened.
"""
