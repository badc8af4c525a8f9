"""The core of LoRA Weave: adapters, files, datasets, training and the bridge to the host."""
