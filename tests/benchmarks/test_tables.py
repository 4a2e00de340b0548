"""The benchmark's bars, on results made up so that every ratio can be seen."""

import pytest

from benchmarks.tables import BEGIN, END, all_met, is_disturbed, markdown, rewrite, rows

GIB = 2**30


def answer(seconds, peak_gib, **more):
    return {"seconds": seconds, "lengths": [4, 4], "peak_bytes": peak_gib * GIB, "others_share": 0.01, **more}


def contestants():
    ours = [
        answer(
            seconds,
            1,
            generate_s=1.0,
            score_s=0.25,
            update_s=0.75,
            phase_peak_bytes={"generate": GIB, "score": GIB, "update": GIB},
            score_flop=100e9,
            update_flop=300e9,
            max_abs_logprob_diff=1e-6,
        )
        for seconds in (2.0, 9.0, 2.0)
    ]
    return {
        "threefold": {"iterations": ours},
        "trl": {"iterations": [answer(seconds, 4, generate_s=3.0) for seconds in (1.0, 8.0, 8.0)]},
        "trl_small_passes": {"iterations": [answer(6.0, 2, generate_s=3.0)]},
        "transformers": {"iterations": [answer(3.5, 1)]},
        "transformers_continuous": {"iterations": [answer(5.0, 1)]},
    }


@pytest.fixture
def results():
    rates = [{"torch.mm": 200e9, "onednn": 450e9}, {"torch.mm": 250e9, "onednn": 500e9}]
    a = {"contestants": contestants(), "rates": rates, "date": "2000-01-01", "small": False}
    points = [
        {
            "axis": "length",
            "batch": 2,
            "length": 4 * 2**k,
            "others_share": 0.0,
            "seconds": {"threefold": [8.0 * 2**k], "transformers": [16.0]},
        }
        for k in range(3)
    ]
    points += [{**point, "axis": "batch"} for point in points]
    return {
        "machine": {"processor": "P", "cores": 2, "memory_gib": 1, "python": "3", "versions": {"torch": "0"}},
        "peers": {"trl": "1"},
        "threads": 2,
        "parts": {
            "A": a,
            "C": {
                "answers_per_prompt": 4,
                "shared_s": [1.0],
                "separate_s": [4.0],
                "date": "2000-01-01",
                "small": False,
            },
            "D": {"prompt_length": 8, "points": points, "date": "2000-01-01", "small": False},
        },
    }


def test_bars(results):
    """Medians: ours 2 s (the 9 s is an outlier), TRL 8 s; 0.4 TFLOP in 1 s at 0.5 TFLOP/s."""
    found = {(row.part, row.what): (row.measured, row.met) for row in rows(results)}
    assert found["A", "PPO iteration, TRL / threefold"] == ("4.00×", True)
    assert found["A", "generation, transformers `generate` / threefold"] == ("3.50×", True)
    assert found["A", "score + update, fraction of the matrix rate"] == ("0.80", True)
    assert found["A", "peak memory, threefold / TRL"] == ("0.25×", True)
    assert found["C", "prefill, 4 answers a prompt / 4 prompts"] == ("0.250", True)
    assert found["D", "time per token, largest factor at a doubling of the length"] == ("1.00×", True)
    assert all_met(results)


def test_a_bar_that_is_missed(results):
    results["parts"]["C"]["shared_s"] = [2.0]
    assert not all_met(results)
    assert "**no**" in markdown(results)


def test_a_disturbed_run_is_called_so(results):
    """One disturbed turn of three does not move a median; two do."""
    turns = results["parts"]["A"]["contestants"]["trl"]["iterations"]
    turns[0]["others_share"] = 0.5
    assert not is_disturbed(results)
    turns[1]["others_share"] = 0.5
    assert is_disturbed(results)
    assert "**Disturbed" in markdown(results)
    del turns[2]["others_share"]
    assert is_disturbed(results)


def test_only_the_marked_part_of_the_page_changes(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n", encoding="utf-8")
    rewrite(page, results)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "4.00×" in text
    assert "stale" not in text
