"""The tasks that are evaluated: one lm-eval YAML file each, and the functions that it names.

A new task is a new YAML file here: its `custom_dataset` reads rows with `opcd.data`, so that a hub data set and a local
file come the same way and a wrong row is named with its file and line; its `generation_kwargs` are the defaults of
`opcd evaluate`; its first metric is the one that pass@k is reported for.
"""
