"""Studies of the method: smol-llava, scenes, and the ablation."""
