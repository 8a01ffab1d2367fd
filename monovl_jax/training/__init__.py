"""Training: which leaves learn, with what schedule, by one pure step, in stages that survive a kill.

stages.py      Stage, Recipe: what a run does, as frozen dataclasses
trainable.py   parameters as nested dicts; the trainable split by path regexes; digests
losses.py      next-token cross entropy without stored logits
optimizer.py   AdamW with decay mask, schedules, clipping
step.py        the jitted training and evaluation steps
checkpoint.py  what lies in a run directory, and reading it back
metrics.py     the JSONL log, TensorBoard, the progress line
loop.py        `train(recipe, run_dir, make_batches)`: all of the above
"""
