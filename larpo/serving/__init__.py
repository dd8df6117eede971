"""Sampling from a server that speaks the OpenAI-compatible API: vLLM, SGLang, `transformers serve`, llama.cpp and others.

`settings` says where the server is and how it hears of new weights, which `weights` sees to; `asking` what is asked for and
what an answer holds, through the `client`; `answers` are on disk as they arrive; `sampler` makes of them what every sampler in
`larpo.sampling` gives.
"""
