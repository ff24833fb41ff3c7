"""LLaMA-Factory 0.9.5 recipes, read as they are: keys, meanings, and the datasets of `dataset_info.json`."""
