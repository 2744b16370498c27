"""What a model costs: multiplications, tokens, memory.

* `pheye`: equations (1)-(4) of Pheye in the paper's convention, and what they are exactly.
* `transformer`: multiply-adds, parameters and cache of ViT and decoder configs.

`hrvlm_jax.parallel.flops.count_flops` counts the same in the traced program of any function.
"""
