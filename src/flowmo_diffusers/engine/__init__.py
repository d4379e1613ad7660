"""What every training run shares; knows modules and optimisers, nothing of FlowMo."""
