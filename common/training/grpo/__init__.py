"""Group Relative Policy Optimization with a shared-prefix forward."""
