"""The science, one module a stage: typed values in, typed values out, no files.

trials -> prompts -> mean_activations -> cie -> function_vector -> injection.
"""
