"""All ablations, in the order in which they need each other."""

from experiments.ablations import (
    attention_experts,
    attention_maps,
    evip_stages,
    expert_initialisation,
    routing_cost,
    scaling_pilot,
    text_retention,
    tuning_strategy,
)

EXPERIMENTS = (
    tuning_strategy.EXPERIMENT,
    evip_stages.EXPERIMENT,
    attention_experts.EXPERIMENT,
    expert_initialisation.EXPERIMENT,
    attention_maps.EXPERIMENT,
    routing_cost.EXPERIMENT,
    text_retention.EXPERIMENT,
    scaling_pilot.EXPERIMENT,
)
