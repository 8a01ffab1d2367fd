"""From files (or a procedural world) to packed numpy batches; no array of this package ever touches a device.

    images.py     reading pictures safely            chat.py       templates, prompts, label masks
    tiling.py     pictures -> uint8 tiles            sources.py    samples -> Example (ids, weights, tiles)
    tokenizer.py  text <-> ids                       jsonl.py      LLaVA-style JSONL files
    packing.py    Examples -> one row of a batch     pipeline.py   mixture, shuffle, packs, workers, batches
    meta.py       META.json: a user's data sets

Import from the modules; this file imports nothing, so that `monovl_jax.data.chat` costs neither pillow nor grain.
"""
