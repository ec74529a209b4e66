"""Planted truths: data and trainings of which a test knows by construction what is to be found.

`curves` are curves without a spike, and with one. `arrays` are the clamping and the loss of a run,
with culprits, effects or neither. `rows` are rows of a run log, and what they must sum to. `runs`
are whole run logs that hold one of everything. `trainings` and `llamas` are small trainings with
planted causes of a spike, `delays` those in which it comes long after its cause.

Tests and benchmarks import these as `truths.x`. A training is found again by the import path of its
functions, and so a module must not be there twice under two names.
"""
