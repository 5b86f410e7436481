# remoe.c: make builds what this machine has compilers for, make train trains the tiny preset on the built-in sample,
# make test runs the CPU tests; make help lists the rest.

CC ?= cc
# fp-contract and the two no- flags let loops use fused multiply-adds and vector selects; none of them reorders a sum
accepts = $(shell echo 'int x;' | $(CC) $(1) -x c -c - -o /dev/null 2>/dev/null && echo $(1))
NATIVE := $(or $(call accepts,-march=native),$(call accepts,-mcpu=native))
CFLAGS ?= -O3 $(NATIVE)
override CFLAGS += -std=c11 -D_GNU_SOURCE -I. -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra \
	$(if $(filter-out 0,$(WERROR)),-Werror)
LDLIBS += -lm -lpthread
# a warning that a newer compiler has thought of ends the tests' build, not a user's
WERROR ?=
test test-cuda test-emulated test-races: WERROR := 1

# what takes IEEE arithmetic away (llmc/arithmetic.h): other losses, no guard against NaN. Cancelling them here would not do:
# gcc also links what flushes tiny numbers to zero
comma := ,
FORBIDDEN := -Ofast -ffast-math -funsafe-math-optimizations -ffinite-math-only -fassociative-math -freciprocal-math \
	-fno-signed-zeros -fapprox-func -fno-honor-nans -fno-honor-infinities -ffp-model=fast -ffp-model=aggressive \
	-fsingle-precision-constant -mdaz-ftz --use_fast_math -use_fast_math
asked := $(filter $(FORBIDDEN),$(subst $(comma), ,$(CC) $(CXX) $(CFLAGS) $(CPPFLAGS) $(NVCC) $(NVCCFLAGS) $(LDFLAGS)))
$(if $(asked),$(error $(asked): gives other losses and no guard against NaN ---> leave it out, say make CFLAGS='-O3 $(NATIVE)'))

# OpenMP is used where the compiler has it (OPENMP=0 leaves it out); the loops' SIMD hints need no library
OPENMP ?= $(shell printf 'int main(void) { return 0; }' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo 1 || echo 0)
ifeq ($(OPENMP),1)
  override CFLAGS += -fopenmp
else
  override CFLAGS += -fopenmp-simd -Wno-unknown-pragmas
endif
# 512-bit registers where the machine has them: compilers are shy of them by default
ifneq ($(findstring -march=native,$(CFLAGS)),)
  ifeq ($(shell $(CC) -march=native -dM -E -x c /dev/null 2>/dev/null | grep -c __AVX512F__),1)
    override CFLAGS += -mprefer-vector-width=512
  endif
endif

# what --version says
VERSION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
override CFLAGS += -DREMOE_VERSION='"$(VERSION)"'

# nvcc, if there is one (NVCC= leaves CUDA out), and the GPUs to compile for: this machine's, or where none is to be seen
# the oldest and the fastest that are supported. A plain 80 is kept as PTX too, which newer GPUs translate when they load
# it; 90a is Hopper with all its instructions
ifeq ($(origin NVCC),undefined)
  NVCC := $(firstword $(wildcard $(shell command -v nvcc) $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc))
endif
GPU_ARCHS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
	awk -F. 'NF == 2 && $$1 >= 8 { print $$1 $$2 ($$1 == 9 ? "a" : "") }' | sort -u)
CUDA_ARCHS ?= $(or $(GPU_ARCHS),80 90a)
gencode = '-gencode=arch=compute_$(1),code=$(if $(filter %a,$(1)),sm_$(1),[sm_$(1),compute_$(1)])'
NVCCFLAGS ?= -O3 -Xcompiler -march=native
override NVCCFLAGS += -DREMOE_VERSION='"$(VERSION)"' -std=c++17 -I. -Xcompiler -Wall,-Wextra$(if $(filter-out 0,$(WERROR)),$(comma)-Werror --Werror all-warnings)
# the same sources for the CPU, by the plain C++ compiler: dev/emulator stands in for CUDA's headers. (What may be
# uninitialised for gcc is guarded by another variable)
EMULATED = -DREMOE_VERSION='"$(VERSION)"' -std=c++17 -O1 -g $(NATIVE) -DEMULATED -DREMOE_NCCL -Idev/emulator -I. -Wall -Wextra \
	-Wno-unknown-pragmas -Wno-maybe-uninitialized $(if $(filter-out 0,$(WERROR)),-Werror)
ifeq ($(OPENMP),1)
  override NVCCFLAGS += -Xcompiler -fopenmp
  EMULATED += -fopenmp
else
  override NVCCFLAGS += -Xcompiler -Wno-unknown-pragmas
endif
# CUDA programs come in two precisions: NAME computes in bf16, NAME_fp32, for checking, in fp32
%_fp32: private PRECISION_FLAG := -DPRECISION_FP32
$(if $(filter-out bf16,$(PRECISION)),$(error instead of PRECISION=$(PRECISION), make train_remoecu_fp32 or test_remoecu_fp32))

HEADERS := $(wildcard llmc/*.h llmc/*/*.h data/*.h) build/hf_code.h
CUDA_HEADERS := $(HEADERS) $(wildcard llmc/*.cuh llmc/*/*.cuh)
CUDA_TESTS := $(wildcard dev/test/*.h dev/test/cuda/*.cuh)
EMULATOR := $(wildcard dev/emulator/*)
SAMPLE := build/sample/manifest.json
# for gdb: what is optimised away would not be seen. The emulator is not sanitized: its
# threads change stacks, of which AddressSanitizer knows nothing
DEBUG := -O0 -g3 -fno-omit-frame-pointer
SANITIZED := -fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: all found train test test-cuda test-emulated test-races compare debug bench bench-gpu sample sample-data fuzz format
.PHONY: clean help

all: found train_remoe data-tools $(if $(and $(NVCC),$(wildcard train_remoe.cu)),train_remoecu)

found: # what was found, and what each missing piece costs
	@dev/found.sh '$(CC)' '$(OPENMP)' '$(NVCC)' '$(GPU_ARCHS)' '$(CUDA_ARCHS)'

# the modelling code that --export puts beside a model's weights: a text per file
build/hf_code.h: dev/hf/configuration_remoe.py dev/hf/modeling_remoe.py Makefile
	@mkdir -p build
	@for file in $(filter %.py,$^); do \
		echo "static const char $$(basename $$file .py)_py[] ="; sed 's/[\\"]/\\&/g; s/.*/    "&\\n"/' $$file; echo '    ;'; \
	done >$@

train_remoe: train_remoe.c $(HEADERS) Makefile
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

test_remoe: test_remoe.c train_remoe.c $(HEADERS) $(wildcard dev/test/*.h) Makefile
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

need_nvcc = $(if $(NVCC),,$(error $@ needs nvcc, of the CUDA Toolkit: make $@ NVCC=/path/to/nvcc))
# NCCL connects ranks whose GPUs do not reach each other's memory, on one machine or several (NCCL= leaves it out). Which libnccl
# it is: PyTorch's package has libnccl.so.2 alone
NCCL ?= $(shell dev/nccl.sh)
nccl_library = $(firstword $(wildcard $(foreach lib,lib lib64 lib/x86_64-linux-gnu lib/aarch64-linux-gnu,$(NCCL)/$(lib)/libnccl.so $(NCCL)/$(lib)/libnccl.so.2)))
nccl_flags = $(if $(NCCL),-DREMOE_NCCL -I$(NCCL)/include $(nccl_library) -Xlinker -rpath=$(dir $(nccl_library)))
nvcc_build = $(need_nvcc)dev/nvcc.sh $(NVCC) $(foreach arch,$(CUDA_ARCHS),$(call gencode,$(arch))) $(NVCCFLAGS) $(PRECISION_FLAG) \
	$< -o $@ -lcublas -lcublasLt $(nccl_flags) $(LDLIBS)
emulated_build = $(CXX) $(EMULATED) $(PRECISION_FLAG) -x c++ $< -o $@ $(LDLIBS)

# said before a long build, not after it
.PHONY: need-gpu
need-gpu:
	@nvidia-smi -L >/dev/null 2>&1 || { echo 'error: no GPU is to be seen here (nvidia-smi -L)' >&2; \
		echo '  ---> on the CPU: make test-emulated, make compare GPU=./train_remoecu_emulated' >&2; exit 1; }

train_remoecu train_remoecu_fp32: train_remoe.cu $(CUDA_HEADERS) Makefile
	$(nvcc_build)

test_remoecu test_remoecu_fp32: dev/test/test_remoe.cu train_remoe.cu train_remoe.c $(CUDA_HEADERS) $(CUDA_TESTS) Makefile
	$(nvcc_build)

# for compute-sanitizer: small shapes only, and lines in its reports
build/test_remoecu_small build/test_remoecu_small_fp32: dev/test/test_remoe.cu train_remoe.cu train_remoe.c $(CUDA_HEADERS) \
		$(CUDA_TESTS) Makefile
	@mkdir -p build
	$(nvcc_build) -DSMALL_TESTS -lineinfo

train_remoecu_emulated train_remoecu_emulated_fp32: train_remoe.cu $(CUDA_HEADERS) $(EMULATOR) Makefile
	$(emulated_build)

test_remoecu_emulated test_remoecu_emulated_fp32: dev/test/test_remoe.cu train_remoe.cu train_remoe.c $(CUDA_HEADERS) \
		$(CUDA_TESTS) $(EMULATOR) Makefile
	$(emulated_build)

# for ThreadSanitizer, which the emulator tells of CUDA's threads
build/test_remoecu_races: dev/test/test_remoe.cu train_remoe.cu train_remoe.c $(CUDA_HEADERS) $(CUDA_TESTS) $(EMULATOR) Makefile
	@mkdir -p build
	$(emulated_build) -DSMALL_TESTS -fsanitize=thread

build/%: data/%.c $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

.PHONY: data-tools
data-tools: build/train_tokenizer build/tokenize

# the built-in sample: a vocabulary of its own, and shards
$(SAMPLE): data/sample.jsonl build/train_tokenizer build/tokenize
	@mkdir -p build/sample
	build/train_tokenizer --vocab-size 2048 --out build/sample data/sample.jsonl
	rm -f build/sample/*.bin* build/sample/manifest.json build/sample/tokenize.state.json build/sample/unreadable.txt*
	build/tokenize --tokenizer build/sample --out build/sample --val-fraction 0.1 data/sample.jsonl

sample-data: $(SAMPLE)

sample:
	data/make_sample.sh

train: train_remoe $(SAMPLE)
	./train_remoe

test: test_remoe train_remoe $(SAMPLE)
	./test_remoe

test-cuda: need-gpu test_remoecu test_remoecu_fp32
	./test_remoecu_fp32
	./test_remoecu

test-emulated: test_remoecu_emulated test_remoecu_emulated_fp32
	./test_remoecu_emulated_fp32
	./test_remoecu_emulated

# which components; all take some minutes
RACES ?=
test-races: build/test_remoecu_races
	OMP_NUM_THREADS=1 build/test_remoecu_races --portable --few $(RACES)

build/compare_dumps: dev/compare_dumps.c $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

# the CUDA trainer's losses, gates and gradients beside the CPU trainer's; GPU=./train_remoecu_fp32 and
# GPU=./train_remoecu_emulated are others to compare, LOAD=DIR another model
GPU ?= ./train_remoecu
compare: $(if $(findstring emulated,$(GPU)),,need-gpu) train_remoe $(notdir $(GPU)) build/compare_dumps $(SAMPLE)
	dev/compare_cpu_gpu.sh $(GPU) $(LOAD)

# step through them: dev/README.md
debug: $(addprefix build/debug/,train_remoe test_remoe train_remoecu_emulated test_remoecu_emulated)

build/debug/%_remoe: %_remoe.c train_remoe.c $(HEADERS) $(wildcard dev/test/*.h) Makefile
	@mkdir -p build/debug
	$(CC) $(CFLAGS) $(DEBUG) $(SANITIZED) $< -o $@ $(LDLIBS)

build/debug/train_remoecu_emulated: train_remoe.cu $(CUDA_HEADERS) $(EMULATOR) Makefile
	@mkdir -p build/debug
	$(emulated_build) $(DEBUG)

build/debug/test_remoecu_emulated: dev/test/test_remoe.cu train_remoe.cu train_remoe.c $(CUDA_HEADERS) $(CUDA_TESTS) $(EMULATOR) \
		Makefile
	@mkdir -p build/debug
	$(emulated_build) $(DEBUG)

build/bench_matmul: dev/bench/bench_matmul.c $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS) -ldl

build/bench_tokenizer: dev/bench/bench_tokenizer.c $(HEADERS) Makefile
	@mkdir -p build
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

bench: build/bench_matmul train_remoe $(SAMPLE)
	build/bench_matmul
	./train_remoe --bench --lambda-init 1e-3

build/ladder_%: private override CUDA_ARCHS := 90a
build/ladder_%: dev/ladder/%.cu dev/ladder/ladder.cuh $(CUDA_HEADERS) Makefile
	@mkdir -p build
	$(nvcc_build)

# GPT2_DATA='shards of GPT-2 tokens'; ROWS='small g8' for some rows alone, PEER=script.py for a PyTorch trainer beside them
bench-gpu:
	dev/bench_gpu.sh $(ROWS)

# one fuzz target (clang's libFuzzer) for FUZZ_SECONDS; a find goes to dev/fuzz/corpus, which the tests replay
TARGET ?= fuzz_json
FUZZ_SECONDS ?= 60
fuzz:
	@mkdir -p build/fuzz/$(TARGET)
	clang -g -O1 -march=native -D_GNU_SOURCE -fsanitize=fuzzer,address,undefined -Wno-unknown-pragmas -I. \
		dev/fuzz/$(TARGET).c -o build/$(TARGET) -lm -lpthread
	build/$(TARGET) -max_total_time=$(FUZZ_SECONDS) -close_fd_mask=2 -max_len=65536 -detect_leaks=0 -rss_limit_mb=4096 \
		-artifact_prefix=build/fuzz/ build/fuzz/$(TARGET) $(wildcard dev/fuzz/corpus/$(TARGET:fuzz_%=%))

# a page of a run, or of two side by side; STATS and TRACE name what is not in the runs' folders
RUN ?= runs/tiny-relu
REPORT_PYTHON ?= $(firstword $(wildcard build/report/bin/python) python3)
.PHONY: report
report:
	$(REPORT_PYTHON) dev/report/report.py $(RUN) $(RUN2) $(if $(STATS),--stats $(STATS)) $(if $(TRACE),--trace $(TRACE)) $(if $(OUT),--out $(OUT))

# all that .clang-format governs, in place
format:
	@command -v clang-format >/dev/null || { echo 'make format needs clang-format ---> apt-get install clang-format'; exit 1; }
	clang-format -i $(sort $(foreach kind,c h cu cuh,$(wildcard $(foreach folder,. llmc llmc/* data dev dev/*,$(folder)/*.$(kind)) \
		dev/test/cuda/*.$(kind))))

clean:
	rm -rf build train_remoe test_remoe train_remoecu* test_remoecu*

help:
	@echo 'make              ./train_remoe, build/tokenize, build/train_tokenizer, and ./train_remoecu where there is nvcc; says what it found'
	@echo 'make found        what was found here: compilers, CUDA, GPU, NCCL; part of make'
	@echo 'make train        train the tiny preset on the built-in sample, through the three stages, and show text'
	@echo 'make test         the CPU tests'
	@echo 'make test-cuda    the CUDA tests, in bf16 and fp32'
	@echo 'make test-emulated  the same sources on the CPU, for machines without a GPU'
	@echo 'make test-races   the CUDA sources on the CPU, barriers that are missing between threads; RACES=COMPONENTS'
	@echo 'make compare      what both trainers say of one micro-batch, tensor by tensor; GPU=./train_remoecu_fp32, LOAD=DIR'
	@echo 'make debug        both trainers (the CUDA one emulated) and their tests for gdb, in build/debug; the C ones sanitized'
	@echo 'make fuzz         a parser against hostile bytes (clang); TARGET=fuzz_json, FUZZ_SECONDS=60'
	@echo 'make bench        sgemm against OpenBLAS (where installed), and the trainer'
	@echo "make bench-gpu    speed on this GPU, into README's table; GPT2_DATA=SHARDS, ROWS='small g8', PEER=script.py"
	@echo 'make report       a page of a run to look at (Python: dev/report/requirements.txt); RUN=runs/x, RUN2=runs/y, STATS=FILES, TRACE=FILES'
	@echo 'make sample       remake data/sample.jsonl from the sources'
	@echo 'make sample-data  its vocabulary and token shards, in build/sample'
	@echo 'make data-tools   build/train_tokenizer and build/tokenize: a vocabulary and token shards of your own text'
	@echo 'make train_remoecu_fp32   the CUDA trainer in fp32, to check with; train_remoecu_emulated: on the CPU'
	@echo 'make format       clang-format all sources in place'
	@echo 'make clean        remove what was built; runs/ stays'
	@echo 'with: CC=clang, CFLAGS=..., OPENMP=0 (one thread), NVCC= (no CUDA), NCCL= (one machine), CUDA_ARCHS="80 90a", WERROR=1 (warnings are errors)'
