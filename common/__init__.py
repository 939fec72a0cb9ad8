"""Everything that no single paper owns: data, models, rollouts, GRPO, evaluation, reports."""
