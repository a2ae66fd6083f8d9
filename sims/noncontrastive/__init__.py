"""Non-contrastive learning: why linear BYOL does not collapse, and what its parts are for."""
