"""The actual networks: Flax modules, their data and their training. Imports nothing of sims.

training      train(loss, params, optimizer, ...): gradient descent as one compiled program, recorded
attention     prompts, heads, products of weights, and the attention of each theory
galore        GaLore for Optax: scale_by_galore, galore, 8-bit moments, layer by layer
lowrank       LoRA, ReLoRA and W = A B
vit, llama    a vision transformer, and the shapes of LLaMA
collapse      linear networks with noise that is drawn on their hidden units
self_supervised  encoders that are trained by contrast, and losses of a batch of pairs
byol, predictors  linear BYOL, and predictors that are set instead of trained
locations     nodes on disjoint locations, for patterns of tokens
vae           variational autoencoders with a linear decoder and latents that are drawn
layer, losses, optimizers, memory, functional    pieces that several networks share
data          teachers, token sequences, patterns of tokens, text, images, and runs recorded by others
"""

import dynamics as dynamics  # its workarounds must come before JAX starts
