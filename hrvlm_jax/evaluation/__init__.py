"""Evaluation: benchmarks, scorers, resumable runs, cost model and the analyses of the papers.

* `benchmarks`: official files -> samples; scorers; submission files.
* `metrics`: the scorers themselves, plain Python.
* `prompts`: one template file per benchmark and system.
* `runner`: `evaluate`, `score_predictions`: predictions that survive a kill; provenance.
* `report`: an HTML page of examples. `cost`: FLOPs, tokens, memory. `analysis`: tertiles, minimum
  resolution, accuracy curves, attention shares, PCA maps. `lmms_eval_plugin`: lmms-eval's model.

Nothing here imports JAX, except what a caller passes in.
"""
