# Needs Python >= 3.10 with venv, a C++ compiler (fairseq comes as source) and a package index. Everything that is
# installed goes into .venv: about 6.5 GB.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
HARD := .venv-hard
PYTEST_FLAGS ?= -n auto --dist loadfile --no-loadscope-reorder

# fairseq's build needs these. In an isolated build environment pip would fetch a second torch of several GB for it.
BUILD_TOOLS := torch torchvision numpy cython wheel 'setuptools>=77'

.PHONY: test demo bench lint test-oldest test-hard test-sanitized clean

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

demo: $(VENV)/ready
	$(VENV)/bin/python recipes/demo/run.py

# About 15 minutes on two cores, on which nothing else should run. `make bench BENCH_FLAGS=…` for another device or number
# of threads.
bench: $(VENV)/ready
	$(VENV)/bin/python -m benchmarks --results benchmarks/results $(BENCH_FLAGS)
	$(VENV)/bin/python -m benchmarks --update-readme

lint: $(VENV)/ready
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy sing_plugins integrations/sing_* recipes benchmarks docs/size.py

# With the oldest versions that pyproject.toml admits, all at once. Left out are the tests of what that torch cannot do:
# Muon came later to torch and to timm, its FSDP2 takes neither HSDP on a CPU nor uneven shards of tensor parallel, that
# Accelerate neither resumes FSDP2 nor makes full checkpoints of it, nor lets Trainer have it on a CPU, and the interpreter
# of its Triton fails with today's NumPy.
NOT_OLDEST := matrices_only optimizer_of_rde optimizer_of_digits hsdp fsdp2_of_tensor_parallel \
	resumes_through_accelerate full_checkpoint fsdp2_in_two_processes_equals_one_and_resumes in_the_interpreter
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest $(PYTEST_FLAGS) -k "$(foreach name,$(NOT_OLDEST),not $(name) and) test"

# What takes long or needs what nobody else should have: DeepSpeed changes Accelerate and Transformers where it is
# installed. Its environment sees the packages of the ordinary one.
test-hard: $(HARD)/ready
	$(HARD)/bin/python -m pytest tests/hard

$(HARD)/ready: $(VENV)/ready
	$(VENV)/bin/python -m venv $(HARD)
	$(VENV)/bin/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$($(HARD)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/ordinary.pth
	$(HARD)/bin/python -m pip install deepspeed
	touch $@

# The compiled kernel under AddressSanitizer and UndefinedBehaviorSanitizer, with the flags that pyproject.toml has. torch
# takes its memory from malloc, so that an entry too far is found there as well. Threads of a fork end without a word.
SANITIZED := build/sanitized
test-sanitized: $(VENV)/ready
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r sing_plugins $(SANITIZED) && rm $(SANITIZED)/sing_plugins/kernels/*.so
	gcc -fsanitize=address,undefined -fno-sanitize-recover=all -g -std=c11 -O3 -fopenmp-simd -ffp-contract=fast \
		-fno-math-errno -fno-trapping-math -fPIC -shared \
		-o $(SANITIZED)/sing_plugins/kernels/_cpu.abi3.so sing_plugins/kernels/_cpu.c
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		SANITIZED=$(SANITIZED) $(VENV)/bin/python -m pytest tests/test_kernels.py -p no:xdist \
		--override-ini 'pythonpath=$(SANITIZED)'

$(OLDEST)/ready: FLOORS = $(shell grep -oE '"(torch|transformers|timm|accelerate)>=[0-9.]+' pyproject.toml | \
	sed 's/"//; s/>=/==/' | sort -u)

%/ready: pyproject.toml sing_plugins/kernels/_cpu.c
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python >= 3.10 is needed: make PYTHON=...')"
	@command -v $${CXX:-c++} > /dev/null || { echo 'A C++ compiler is needed to build fairseq, such as g++.'; exit 1; }
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install $(BUILD_TOOLS) $(FLOORS)
	@# The fairseq of Python 3.10: newer pips refuse its metadata, and where its build sees torch it misses a file.
	if $*/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then \
		$*/bin/python -m pip install 'pip<24.1' && $*/bin/python -m pip install 'fairseq>=0.12.2'; fi
	$*/bin/python -m pip install --no-build-isolation --editable '.[all,dev]' $(FLOORS)
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(HARD) build demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
