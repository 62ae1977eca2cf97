"""Deadlines and attainment, the same for policies, server metrics, replay and simulator. Pure."""
