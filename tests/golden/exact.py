"""ε by methods that share nothing with ours: inversion of the loss's Laplace transform, and plain convolution.

δ(ε) = 1/2πi ∫ exp(K(z) − zε) / (z(z+1)) dz along a line through the saddle point, where K is the logarithm of the moment
generating function of the composed loss, each moment integrated by the trapezoid rule. Relative precision is some 1e-9
even for tiny δ. Where few units are drawn the loss has two humps and no such line is near both: there its distribution is
put on a grid, masses of both neighbours kept, and convolved term by term, which keeps every probability's relative
precision. Needs numpy. Prints the values of `laplace_inversion_agrees` and of `rare_draws_are_not_drowned_by_rounding` in
src/privacy/tests/golden.rs; the second takes a minute.
"""

import math

import numpy as np


def pieces(event):
    q, sigma, steps = event
    spacing = min(sigma / 16, sigma * sigma / 6)
    x = np.arange(-16 * sigma, 1 + 24 * sigma, spacing)
    t = (2 * x - 1) / (2 * sigma * sigma)
    if q == 1:
        loss = t
    else:
        large = t + math.log(q) + np.log1p((1 - q) / q * np.exp(-np.maximum(t, 0)))
        loss = np.where(t < 30, np.log1p(q * np.expm1(np.minimum(t, 30))), large)
    log_mass = -x * x / (2 * sigma * sigma) + math.log(spacing / (sigma * math.sqrt(2 * math.pi)))
    return loss, log_mass, steps


def cumulant(parts, z):
    total = 0
    for loss, log_mass, steps in parts:
        exponent = log_mass[None, :] + (z[:, None] + 1) * loss[None, :]
        top = exponent.real.max(axis=1, keepdims=True)
        total = total + steps * (top[:, 0] + np.log(np.exp(exponent - top).sum(axis=1)))
    return total


def log_delta(parts, epsilon):
    def phase(x):
        return cumulant(parts, np.array([x + 0j]))[0].real - x * epsilon - math.log(x * (x + 1))

    golden = (math.sqrt(5) - 1) / 2
    low, high = math.log(1e-3), math.log(1e4)
    for _ in range(28):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if phase(math.exp(a)) < phase(math.exp(b)) else (a, high)
    saddle = math.exp((low + high) / 2)
    h = 1e-3 * saddle
    width = h / math.sqrt(phase(saddle + h) - 2 * phase(saddle) + phase(saddle - h))
    y = np.arange(0, 9 * width, width / 6)
    base = cumulant(parts, np.array([saddle + 0j]))[0].real - saddle * epsilon
    values = []
    for i in range(0, len(y), 16):
        z = saddle + 1j * y[i : i + 16]
        values.append((np.exp(cumulant(parts, z) - z * epsilon - base) / (z * (z + 1))).real)
    values = np.concatenate(values)
    values[0] /= 2
    return base + math.log(values.sum() * (width / 6) / math.pi)


def epsilon(events, delta, low, high):
    parts = [pieces(event) for event in events]
    while high - low > 1e-5:
        middle = (low + high) / 2
        if log_delta(parts, middle) > math.log(delta):
            low = middle
        else:
            high = middle
    return high


def on_grid(event, interval):
    """The loss to either neighbour, rounded onto a grid such that both masses are kept: (first index, masses)."""
    q, sigma, _ = event
    spacing = sigma / 4000
    x = np.arange(-10 * sigma, 1 + 14 * sigma, spacing)
    t = (2 * x - 1) / (2 * sigma * sigma)
    large = t + math.log(q) + np.log1p((1 - q) / q * np.exp(-np.maximum(t, 0)))
    loss = np.where(t < 30, np.log1p(q * np.expm1(np.minimum(t, 30))), large)
    without = -x * x / (2 * sigma * sigma) + math.log(spacing / (sigma * math.sqrt(2 * math.pi)))
    for loss, log_mass in [(loss, without + loss), (-loss, without)]:
        low = np.floor(loss / interval)
        up = np.expm1(low * interval - loss) / math.expm1(-interval)
        first = int(low.min())
        masses = np.zeros(int(low.max()) - first + 2)
        np.add.at(masses, (low - first).astype(int), np.exp(log_mass) * (1 - up))
        np.add.at(masses, (low - first).astype(int) + 1, np.exp(log_mass) * up)
        yield first, masses


def together(one, other, widest):
    """The sum of two losses: (first index, masses, mass above the grid); beyond `widest`, losses count as more."""
    start, masses = one[0] + other[0], np.convolve(one[1], other[1])
    low, high = max(-widest - start, 0), max(widest - start, 0)
    masses[low] += masses[:low].sum()
    return start + low, masses[low:high], one[2] + other[2] + masses[high:].sum()


def epsilon_by_convolution(event, delta, interval, highest):
    worst, nothing, widest = 0.0, (0, np.ones(1), 0.0), round(highest / interval)
    for first, masses in on_grid(event, interval):
        step, steps = together((first, masses, 0.0), nothing, widest), nothing
        for digit in f"{event[2]:b}":
            steps = together(steps, steps, widest)
            steps = together(steps, step, widest) if digit == "1" else steps
        start, total, infinite = steps
        losses = (start + np.arange(len(total))) * interval
        low, high = 0.0, highest
        while high - low > 1e-7:
            middle = (low + high) / 2
            excess = total * np.maximum(-np.expm1(np.minimum(middle - losses, 0.0)), 0.0)
            low, high = (middle, high) if infinite + excess.sum() > delta else (low, middle)
        worst = max(worst, high)
    return worst


if __name__ == "__main__":
    print(epsilon([(4096 / 180_000, 1.122, 439)], 5e-7, 2.85, 2.87))
    print(epsilon([(0.1005, 15.04, 38_880)], 9.939e-11, 8.895, 8.915))
    print(epsilon([(0.01163, 0.7893, 1794), (2.272e-5, 1.437, 505), (1, 4.175, 1)], 7.013e-12, 9.285, 9.305))
    print(epsilon([(1, 27.17, 1), (0.001623, 0.6161, 1161), (0.02044, 0.5932, 64)], 5.534e-12, 12.59, 12.61))
    print(epsilon_by_convolution((1e-4, 1.0, 1), 1e-12, 5e-4, 4.0))
    print(epsilon_by_convolution((1e-6, 0.5, 10), 1e-10, 5e-4, 4.0))
    print(epsilon_by_convolution((1e-6, 0.45, 100), 1e-11, 5e-4, 4.0))
    print(epsilon_by_convolution((1e-6, 0.5, 10_000), 1e-10, 1e-4, 2.0))
    print(epsilon_by_convolution((1e-5, 0.7, 10_000), 1e-10, 1e-4, 1.0))
