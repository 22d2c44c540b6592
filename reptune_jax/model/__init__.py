"""The decoder as one pure function of (params, tokens, interventions)."""
