from conftest import WINDOW, seeds

from pipeline_tango.prompts import texts_at


def test_texts_move_with_time():
    keyframes = [[(0.0, "a")], [(1.0, "b"), (3.0, "c"), (4.0, "d")]]
    for seconds, rows, next_rows, share in (
        (0.0, [0, 1], [0, 2], 0.0),
        (1.5, [0, 1], [0, 2], 0.25),
        (3.0, [0, 2], [0, 3], 0.0),
        (9.0, [0, 3], [0, 3], 0.0),
    ):
        assert [each.tolist() for each in texts_at(seconds, keyframes, 1)] == [rows, next_rows, [0.0, share]]
    assert texts_at(3.5, keyframes, 2)[0].tolist() == [0, 1, 4, 5]


def test_a_prompt_that_moves_starts_as_one_and_ends_as_the_other(call):
    options = {"audio_length_in_s": 2.0, "window_length_in_s": WINDOW, "guidance_scale": 3.0, "output_type": "latent"}
    rain, dog = call("rain", **options), call("a dog barks", **options)
    moving = call([(0.8, "rain"), (1.2, "a dog barks")], **options)
    assert (moving - rain)[:, :, :10].abs().max() < 1e-4 < (moving - rain)[:, :, 20:].abs().max()
    assert (moving - dog)[:, :, 44:].abs().max() < 1e-4
    assert (call([(0.0, "rain"), (2.0, "rain")], **options) - rain).abs().max() < 1e-4
    batch = call(
        ["a dog barks", [(0.8, "rain"), (1.2, "a dog barks")]],
        negative_prompt=["", ""],
        num_waveforms_per_prompt=2,
        generator=seeds(1, 2, 1, 0),
        **options,
    )
    assert (batch[3] - moving[0]).abs().max() < 1e-3
