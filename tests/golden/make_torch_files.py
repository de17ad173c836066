"""Writes golden/torch_*: small files by `torch.save`, for the reader that needs no torch.

Needs torch (`pip install '.[parity]'`). The numbers are those of `test_convert_torch_zip.py`.
"""

import collections
from pathlib import Path

import torch

GOLDEN = Path(__file__).resolve().parent


def main() -> None:
    grid = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = collections.OrderedDict(
        bfloat16=grid.to(torch.bfloat16),
        float16=grid.to(torch.float16),
        float32=grid,
        int64=torch.arange(3),
        transposed=grid.T,  # shares the storage of `float32`
        slice=grid[1:3, 2:5],
        every_other=grid[:, ::2],
        expanded=torch.tensor([7.0]).expand(5),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
    )
    torch.save(state, GOLDEN / "torch_state.pth")
    linear = torch.nn.Linear(2, 3, bias=False)
    linear.weight.data = torch.arange(6, dtype=torch.float32).reshape(3, 2)
    torch.save(linear.state_dict(), GOLDEN / "torch_module.bin")
    torch.save(state, GOLDEN / "torch_before_1_6.pth", _use_new_zipfile_serialization=False)
    torch.save(linear, GOLDEN / "torch_whole_module.pth")
    tensors = [torch.arange(3, dtype=torch.float32) + i for i in range(3)]
    parameters = {
        "plain": torch.nn.Parameter(tensors[0]),
        "with attributes": torch.nn.Parameter(tensors[1]),
        "tensor with attributes": tensors[2],
    }
    for name in list(parameters)[1:]:
        parameters[name].is_shared_by = "two"
    torch.save(parameters, GOLDEN / "torch_parameters.bin")
    torch.serialization.set_crc32_options(False)
    torch.save({"a": torch.ones(3)}, GOLDEN / "torch_no_sums.bin")


if __name__ == "__main__":
    main()
