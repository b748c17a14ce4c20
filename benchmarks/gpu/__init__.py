"""The engine for GPUs on one machine without network: its parts, alone, in the daemon, and beside other programs.

    python -m benchmarks.gpu [--models large-v3,large-v3-turbo] [--parts probes,engine,peers,daemon] [--json FILE]
    python -m benchmarks.gpu --smoke          # seconds, on the CPU, a tiny model: that the script works, not speed

Engine and peers compute with RANDOM weights of the true sizes, and the texts of all systems have the SAME FORCED
lengths (a wrong length ends the run), so speed is that of the real models and the texts mean nothing. The tokenizer is
that of the embedded tiny.en, or of ``--snapshot``. Neither PyAV nor CTranslate2 is needed for probes, engine and peers;
a part whose libraries are missing says so.

Mixes: ``packed`` windows of 23 s and 76 tokens in the mean, as in MLPerf Inference's Whisper (the same work, and no
MLPerf result); ``short`` utterances of 6 s in the median; ``constant`` 76 tokens each. Every window counts as 30 s of
work, whatever it holds; RTFx counts real audio. Latencies are of windows that come by chance at 30, 60 and 80 % of what
the engine can do; ``interactive`` ones are short, beside a file without an end.

The daemon has a model of the same size whose texts end after 76 tokens by themselves, with their timestamps, so its
windows are a little more work than those of the engine alone: compare it with ``constant``.

Predict before you run, and write it down. For an H200 (790 TFLOP/s and 4.3 TB/s, as the roofline of this package takes
them), 76 tokens and 128 slots in float16, derived and not measured:

    model             floor of a window   roofline          a simulation with 80 % of the memory's speed,
                                                            70 % of the encoder's, 90 tokens
    large-v3          8.0 ms              126 windows/s     80 windows/s in flight, 46 in static batches of 128
    large-v3-turbo    3.5 ms              283 windows/s     191, 154
    distil-large-v3   3.2 ms              311 windows/s     211, 186

    latency (p50 / p99) at 30, 60, 80 % load: large-v3 181/383, 292/732, 492/1149 ms; turbo 39/96, 68/245, 137/540 ms
    encoder: 2.59 TFLOP for a window of large-v3, 3.3 ms at the peak; cross attention: 246 MB for each window and token

Where a part falls short of its prediction, the probes say which one: encoder by batch and attention backend, attention
over slots in GB/s, steps launched and recorded with the gaps between their kernels, spectrograms, voice detector.
"""
