"""One module an op: inputs, cases, keyword variants, costs and peers in eager PyTorch."""
