"""What a run leaves in its folder, and how another run recognises it: settings, identity, checkpoints."""
