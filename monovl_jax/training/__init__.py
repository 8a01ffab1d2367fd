"""Training: which leaves learn, with what schedule, by one pure step, in stages that survive a kill.

stages.py      Stage, Recipe: what a run does, as frozen dataclasses
trainable.py   parameters as nested dicts; the trainable split by path regexes; digests
losses.py      next-token cross entropy without stored logits
optimizer.py   AdamW with decay mask, schedules, clipping
step.py        the jitted training and evaluation steps
files.py       folders and small files, local or in a bucket
fingerprint.py 64 bits over every leaf, the same on every mesh
store.py       the folder of a stage: base, step checkpoints, final; damage found by name
checkpoint.py  whose a run directory is, and reading it back
inventory.py   `monovl checkpoints ls|verify`
metrics.py     the JSONL log, TensorBoard, the progress line
flops.py       model FLOPs by token type
devices.py     peaks, XLA options and memory by kind of device
guards.py      spikes, stalls, the batch that spoiled the numbers
preemption.py  SIGTERM
profiling.py   traces of some steps
accounting.py  steps that come back: rows, time that was useful, updates left out
loop.py        `train(recipe, run_dir, make_batches)`: all of the above
"""
