"""What the experiments on regularisers of few labelled digits have in common."""
