"""GPU kernels of the CUDA engine: one file per op, each with its plain-PyTorch twin in `reference`.

`B` sequences, `T` packed tokens, `H` hidden, `I` intermediate, `D` head dimension. A batch is packed: the tokens of all
sequences in one row, without padding. `starts` and `ends` (int32 [T]) say of every token where its sequence begins and
ends. Nothing here is imported unless the CUDA engine was chosen; every module but `reference` needs triton.
"""

HEAD_SIZES = (32, 64)  # that every kernel of the attention knows
