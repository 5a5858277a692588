"""The libraries' own training step, run on tensors that have a shape and a dtype and no memory.

transformers, PEFT, a stand-in for bitsandbytes' layer, autograd, checkpointing and TRL's output head run as they do on a GPU.
A `ledger` notes each tensor that comes and goes; `on_a_gpu` puts CUDA's kernels and its autocast in place of the CPU's. A
decoder's layers are few kinds over and over (`layers_alike`), so `trace` runs some of them, `whole` puts the whole model
together, and `prediction` says what a run takes. Nothing is fitted.
"""
