"""A problem becomes a plan: pure, cached, explainable."""
