"""AdamW with 8-bit moments against torch's."""

import torch
from torch import nn

from gspn2_diffusion.training import checkpoint as ckpt
from gspn2_diffusion.training.optim import JointOptimizer
from gspn2_diffusion.training.optim8bit import AdamW8bit, pack, unpack


def test_codes_keep_the_values_of_every_block():
    values = torch.randn(5, 300) * torch.logspace(-6, 2, 5)[:, None]
    codes, scales = pack(values, signed=True)
    assert codes.dtype == torch.int8
    found = unpack(codes, scales, values.shape)
    rows, wanted = (torch.nn.functional.pad(t.flatten(), (0, 36)).view(-1, 256) for t in (found, values))
    largest = wanted.abs().amax(dim=1, keepdim=True)
    assert float(((rows - wanted).abs() / largest).max()) < 0.01
    codes, scales = pack(values.square(), signed=False)
    found = unpack(codes, scales, values.shape)
    assert bool((found[values != 0] > 0).all())
    assert float((found / values.square())[values.square() > 1e-4 * largest.max() ** 2].max()) < 1.2


def fit(optimizer_class, steps=200):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    optimizer = JointOptimizer([optimizer_class(model.parameters(), lr=3e-3, betas=(0.9, 0.99))])
    x = torch.randn(256, 64)
    target = torch.sin(x @ torch.randn(64, 64) / 8)
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item(), optimizer, model


def test_it_learns_as_torch_adamw_does_in_a_quarter_of_the_memory():
    exact, optimizer, _ = fit(torch.optim.AdamW)
    ours, small, _ = fit(AdamW8bit)
    assert ours < 1.15 * exact
    sizes = [
        sum(v.numel() * v.element_size() for state in o.state.values() for v in state.values())
        for o in (optimizer, small)
    ]
    assert sizes[1] < 0.3 * sizes[0]


def test_its_state_goes_through_a_file_unchanged():
    _, optimizer, model = fit(AdamW8bit, steps=3)
    flat = ckpt.optimizer_tensors(optimizer.state_dict())
    assert {value.dtype for value in flat.values()} == {torch.float32, torch.int8, torch.uint8}
    other = JointOptimizer([AdamW8bit(model.parameters(), lr=3e-3, betas=(0.9, 0.99))])
    other.load_state_dict(ckpt.optimizer_state(flat, other.state_dict()))
    again = ckpt.optimizer_tensors(other.state_dict())
    assert flat.keys() == again.keys()
    assert all(torch.equal(flat[key], again[key]) and flat[key].dtype == again[key].dtype for key in flat)
