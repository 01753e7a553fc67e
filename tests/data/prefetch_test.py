"""Batches made ahead come in order, errors come where their turn is, and the thread ends."""

import threading
import time

import pytest

from mask2dit_jax.data import batches


def test_results_come_in_order_at_most_so_many_ahead():
    made, used = [], []

    def make(i):
        made.append(i)
        assert i <= len(used) + 3
        return i * i

    with batches.prefetched(make, range(20), ahead=2) as results:
        for value in results:
            time.sleep(0.001)
            used.append(value)
    assert used == [i * i for i in range(20)] and made == list(range(20))


def test_the_next_one_is_made_while_the_last_is_in_use():
    made = threading.Event()

    with batches.prefetched(lambda i: made.set() if i == 1 else None, range(5), ahead=1) as results:
        next(results)
        assert made.wait(60)


def test_errors_surface_in_order_and_end_it():
    made = []

    def make(i):
        made.append(i)
        if i == 3:
            raise ValueError('story 3 is broken')
        return i

    with batches.prefetched(make, range(10**6)) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match='story 3 is broken'):
            next(results)
    assert len(made) < 10


def test_leaving_stops_the_thread():
    before = set(threading.enumerate())
    with pytest.raises(KeyError), batches.prefetched(lambda i: i, range(10**9)) as results:
        next(results)
        raise KeyError
    assert set(threading.enumerate()) <= before  # others may have ended
