"""All ablations, in the order in which they need each other."""

from experiments.ablations import attention_experts, evip_stages, expert_initialisation, text_retention, tuning_strategy

EXPERIMENTS = (
    tuning_strategy.EXPERIMENT,
    evip_stages.EXPERIMENT,
    attention_experts.EXPERIMENT,
    expert_initialisation.EXPERIMENT,
    text_retention.EXPERIMENT,
)
