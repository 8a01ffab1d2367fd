"""The papers' ablations, small: one file per claim, all on the same world, model and runner.

python -m experiments                             what there is, and what came out
python -m experiments.ablations                   all of them in order (`make ablations`); the same command continues
python -m experiments.ablations.tuning_strategy   one of them
"""
