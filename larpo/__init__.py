"""The training layer of larpo_kernels on transformers, accelerate, peft and datasets. So far: `larpo.offline`."""
