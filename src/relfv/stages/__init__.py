"""The science, one module a stage: typed values in, typed values out, no files.

trials -> prompts -> clean_trials -> cie -> noise_floor -> function_vector -> injection -> controls, answers, sweeps -> conclusions.
"""
