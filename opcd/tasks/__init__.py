"""The packaged evaluation tasks: one lm-eval YAML file each, and the functions that the file names.

A new task is a new YAML file here. Its `custom_dataset` reads rows with `opcd.data`, so that hub data sets and local
files work alike, and messages about a wrong row name its file and line. Its `generation_kwargs` are the defaults of
`opcd evaluate`. pass@k is reported for its first metric.
"""
