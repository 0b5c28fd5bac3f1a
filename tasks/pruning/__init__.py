"""What `prune` and `trim` take away: heads, neurons, ranks and word pieces; what they are worth, and the repair."""
