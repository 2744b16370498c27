"""What a model costs: multiplications, tokens, memory.

* `pheye`: equations (1)-(4) of Pheye in the paper's convention, and what they are exactly.
* `transformer`: multiply-adds, parameters and cache of ViT and decoder configs.
* `trace`: multiply-adds of any JAX function, counted in its traced program.
"""
