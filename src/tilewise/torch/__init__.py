"""tilewise for torch tensors: the door behind `tilewise.attention`, derivatives of any order, integrations."""
