"""Rehearsals at real size: the published architectures with random weights, in the hub's own format."""
