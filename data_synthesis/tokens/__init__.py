"""From conversations to tokens, loss masks and images, by the verifier's chat template."""
