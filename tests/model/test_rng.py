import numpy as np
import pytest
import torch

from tminus.model.rng import MAX_INDEX, MAX_SEED, image_noise, philox, row_noise, split_seed

CPU = torch.device("cpu")

# kat_vectors of Random123 for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


def words_of(text: str) -> list[torch.Tensor]:
    return [torch.tensor([int(word, 16)]) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS.keys())
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    words = philox(words_of(counter), words_of(key))
    assert " ".join(f"{word.item():08x}" for word in words) == expected


def philox_by_numpy(counter: list[int], key: list[int]) -> list[int]:
    """The same function in Python's unbounded integers."""
    c, k, mask = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & mask, (p0 >> 32) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    return c


def normals_by_numpy(seed: int, index: int, draw: int, size: int) -> np.ndarray:
    """Box-Muller in float64 over philox in Python integers: what `row_noise` should be."""
    blocks = np.array(
        [philox_by_numpy([b, draw, index, 0], [seed & 0xFFFFFFFF, seed >> 32]) for b in range(-(-size // 4))]
    )
    u = ((blocks >> 8) + 0.5) / 2**24
    pairs = ((u[:, 0], u[:, 1]), (u[:, 2], u[:, 3]))
    parts = [
        part * np.sqrt(-2 * np.log(radius))
        for radius, angle in pairs
        for part in (np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle))
    ]
    return np.concatenate(parts)[:size]


@pytest.mark.parametrize("seed", [7, 2**32 + 5, MAX_SEED])
@pytest.mark.parametrize(("index", "draw"), [(0, 0), (MAX_INDEX, 1000)])
def test_noise_is_box_muller_of_philox_to_float32(seed: int, index: int, draw: int) -> None:
    got = image_noise(seed, [index], draw, (1, 9, 7), CPU)[0].flatten().double().numpy()
    np.testing.assert_allclose(got, normals_by_numpy(seed, index, draw, 63), rtol=0, atol=2e-5)


def test_noise_of_a_seed_is_what_it_was_when_the_seed_was_given() -> None:
    """The numbers of the first release: whoever kept a seed keeps the image."""
    kept = {
        (0, 0, 0): [0.9911378026008606, -0.9246625304222107, -0.6176088452339172, -0.4820687472820282],
        (2**40 + 7, 3, 1000): [-1.1864277124404907, -0.3101549446582794, -0.25517600774765015, -0.17224620282649994],
        (MAX_SEED, MAX_INDEX, 5): [0.07569418847560883, 2.021934986114502, -0.016069132834672928, 0.3166649043560028],
    }
    for (seed, index, draw), values in kept.items():
        shape = (1, 4, 4) if seed == MAX_SEED else (1, 2, 2) if seed == 0 else (1, 2, 3)
        z = image_noise(seed, [index], draw, shape, CPU).flatten()
        picked = z[::4] if seed == MAX_SEED else z[:4]
        assert picked.tolist() == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 32, 32), (1, 1, 3)])
def test_row_alone_has_the_bits_it_has_in_a_batch(shape: tuple[int, ...]) -> None:
    seeds, indices, draws = [9, 2**40, 0, 77, MAX_SEED], [0, 5, 2, MAX_INDEX, 1], [0, 1000, 3, 4, 50]

    def rows(which: list[int]) -> torch.Tensor:
        words = torch.tensor([split_seed(seeds[i]) for i in which])
        index, draw = (torch.tensor([values[i] for i in which]) for values in (indices, draws))
        return row_noise(words, index, draw, shape)

    together = rows([0, 1, 2, 3, 4])
    for i in range(5):
        assert torch.equal(rows([i])[0], together[i])
    assert torch.equal(rows([3, 1]), together[[3, 1]])


def test_noise_has_the_same_bits_on_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(image_noise(8, range(40), 2, (3, 33, 31), CPU))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
