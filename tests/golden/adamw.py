"""AdamW on fixed gradients: the golden values of src/train/src/adapter.rs.

`adamw` is `torch.optim.adamw._single_tensor_adamw` (PyTorch 2.11, no AMSGrad) line by line in Python's float64. Where
torch is installed, its own AdamW in float64 must give the same. Prints the rows of `GOLDEN`.
"""

import math

BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
LEARNING_RATES = [1e-2, 2e-2, 5e-3, 1e-2]
START = [0.5, -0.25, 0.0, 3.0]
# A gradient that turns, one that is tiny, one that comes late, one that is large.
GRADIENTS = [
    [0.1, 1e-7, 0.0, -20.0],
    [-0.3, 2e-7, 0.0, -5.0],
    [0.2, -1e-7, 0.5, 40.0],
    [0.0, 3e-7, -0.25, 1.0],
]


def adamw():
    """The parameters after each step."""
    parameters, first, second = list(START), [0.0] * 4, [0.0] * 4
    for step, (rate, gradients) in enumerate(zip(LEARNING_RATES, GRADIENTS), 1):
        step_size = rate / (1 - BETAS[0] ** step)
        correction = math.sqrt(1 - BETAS[1] ** step)
        for i, gradient in enumerate(gradients):
            parameters[i] *= 1 - rate * WEIGHT_DECAY
            first[i] += (gradient - first[i]) * (1 - BETAS[0])
            second[i] = second[i] * BETAS[1] + (1 - BETAS[1]) * gradient * gradient
            parameters[i] -= step_size * first[i] / (math.sqrt(second[i]) / correction + EPSILON)
        yield list(parameters)


def pytorch():
    import torch

    parameters = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([parameters], betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    for rate, gradients in zip(LEARNING_RATES, GRADIENTS):
        optimizer.param_groups[0]["lr"] = rate
        parameters.grad = torch.tensor(gradients, dtype=torch.float64)
        optimizer.step()
        yield parameters.tolist()


if __name__ == "__main__":
    rows = list(adamw())
    for row in rows:
        print("[" + ", ".join(f"{value:.9e}" for value in row) + "],")
    try:
        import torch
    except ImportError:
        print("torch is not installed: not compared")
    else:
        error = max(abs(a - b) for row, other in zip(rows, pytorch()) for a, b in zip(row, other))
        assert error < 1e-12, error
        print(f"torch {torch.__version__} agrees to {error:.1e}")
