/*
safetensors.h, safetensors_writer.h and newfile.h: number formats against their definitions, files written and
read back, offsets beyond 4 GB, every kind of damaged or hostile header, and a disk that fills up.
*/
#ifndef TEST_SAFETENSORS_H
#define TEST_SAFETENSORS_H

#include <glob.h>
#include <math.h>
#include <signal.h>
#include <sys/resource.h>
// defines: glob, ldexp, isnan, isinf, nextafter, signal, setrlimit
#include "llmc/files/safetensors_writer.h"
#include "buffers.h"
#include "harness.h"

#define ST_PATH "build/test/test.safetensors"

// ----------------------------------------------------------------------------
// numbers

static void test_safetensors_bf16(void) {
    int wrong = 0;
    for (uint32_t h = 0; h < 65536; h++) { // there and back
        float x = bf16_to_float((uint16_t)h);
        uint16_t back = float_to_bf16(x);
        wrong += isnan(x) ? !isnan(bf16_to_float(back)) : back != h;
    }
    CHECK(wrong == 0);
    for (uint32_t h = 0; h < 0x7F80; h++) { // between two neighbours: to the nearer, half way to the even one
        uint32_t low = h << 16;
        uint16_t even = (uint16_t)(h + (h & 1));
        wrong += float_to_bf16(float_from_bits(low + 0x7FFF)) != h;
        wrong += float_to_bf16(float_from_bits(low + 0x8000)) != even;
        wrong += float_to_bf16(float_from_bits(low + 0x8001)) != h + 1;
        wrong += float_to_bf16(-float_from_bits(low + 0x8000)) != (even | 0x8000);
    }
    CHECK(wrong == 0);
    CHECK(
        isnan(bf16_to_float(float_to_bf16(float_from_bits(0x7F800001))))); // payload only in the bits cut off
    CHECK(isnan(bf16_to_float(float_to_bf16(float_from_bits(0xFFFFFFFF)))));
    CHECK(float_to_bf16(INFINITY) == 0x7F80 && float_to_bf16(-INFINITY) == 0xFF80);
    CHECK(float_to_bf16(3.4028235e38f) == 0x7F80); // beyond the largest bf16
}

static void test_safetensors_f16(void) {
    int wrong = 0;
    for (int h = 0; h < 65536; h++) {
        int exponent = h >> 10 & 31, mantissa = h & 1023;
        double want = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
        float got = f16_to_float((uint16_t)h);
        if (exponent == 31) {
            wrong += mantissa ? !isnan(got) : !isinf(got);
        } else {
            wrong += fabs((double)got) != want;
        }
        wrong += !isnan(got) && (signbit(got) != 0) != (h >= 32768);
    }
    CHECK(wrong == 0);
}

// ----------------------------------------------------------------------------
// round trips

static const int64_t st_shape[8] = {3, 5, 7, 1, 1, 1, 1, 1};

// tensors: "empty" F32 [0,3], "m" F32 [3,5,7], "half" BF16 [3,5,7,1,1,1,1,1], "scalar" F32 [1], "none" F32 []
static void st_write_sample(const float *x) {
    const int64_t empty[2] = {0, 3}, one[1] = {1};
    Ranks alone = silent_rank(0, 1);
    SafetensorsWriter w;
    safetensors_writer_open(&w, ST_PATH);
    safetensors_declare(&w, "empty", "F32", 2, empty);
    safetensors_declare(&w, "m", "F32", 3, st_shape);
    safetensors_declare(&w, "half \"\xC3\xA9\"", "BF16", 8, st_shape);
    safetensors_declare(&w, "scalar", "F32", 1, one);
    safetensors_declare(&w, "none", "F32", 0, NULL);
    safetensors_begin(&w, &alone);
    safetensors_write_at(&w, 4, 0, x + 8, 1); // in any order
    safetensors_write_at(&w, 1, 1, x + 1, 100);
    safetensors_write_at(&w, 1, 101, x + 101, 4);
    safetensors_write_at(&w, 1, 0, x, 1);
    safetensors_write_at(&w, 2, 50, x + 50, 55);
    safetensors_write_at(&w, 2, 0, x, 50);
    safetensors_write_at(&w, 3, 0, x + 7, 1);
    safetensors_write_at(&w, 0, 0, x, 0);
    safetensors_finish(&w, &alone);
}

static void test_safetensors_round_trip(void) {
    const int64_t empty[2] = {0, 3}, one[1] = {1};
    float x[105], y[105], want[105];
    fill_uniform(x, 105, 1, 3.0f);
    st_write_sample(x);
    CHECK(access(ST_PATH ".tmp", F_OK) != 0);
    Safetensors *st = safetensors_open(ST_PATH, "");
    CHECK(st->count == 5);
    const SafetensorsEntry *m = safetensors_require(st, "m", 3, st_shape);
    CHECK(m->offset % 64 == 0 && m->size == 420 && strcmp(m->dtype, "F32") == 0 && m->ndim == 3);
    safetensors_read_f32(st, m, y);
    CHECK(memcmp(x, y, sizeof(x)) == 0);
    safetensors_read_f32_range(st, m, 40, 3, y);
    CHECK(memcmp(x + 40, y, 12) == 0);
    for (int i = 0; i < 105; i++) {
        want[i] = bf16_to_float(float_to_bf16(x[i]));
    }
    safetensors_read_f32(st, safetensors_require(st, "half \"\xC3\xA9\"", 8, st_shape), y);
    CHECK(memcmp(want, y, sizeof(y)) == 0);
    safetensors_read_f32(st, safetensors_require(st, "scalar", 1, one), y);
    CHECK(y[0] == x[7]);
    safetensors_read_f32(st, safetensors_require(st, "none", 0, NULL), y);
    CHECK(y[0] == x[8]);
    CHECK(safetensors_require(st, "empty", 2, empty)->size == 0);
    CHECK(safetensors_find(st, "M") == NULL && safetensors_find(st, "") == NULL &&
          safetensors_find(st, "z") == NULL);
    CHECK(safetensors_find(st, "__metadata__") == NULL);
    safetensors_close(st);
}

// values that are no floats, as they are; remarks in the header; what cannot be written
static void test_safetensors_integers(void) {
    static const int64_t longs[3] = {INT64_MIN, 0, ((int64_t)1 << 53) + 1}, two[1] = {2}, three[1] = {3};
    static const int32_t ints[2] = {INT32_MIN, 7};
    Ranks alone = silent_rank(0, 1);
    SafetensorsWriter w;
    safetensors_writer_open(&w, ST_PATH);
    safetensors_note(&w, "made of", "a \"b\"\n\\x41");
    safetensors_note(&w, "empty", "");
    safetensors_declare(&w, "longs", "I64", 1, three);
    safetensors_declare(&w, "ints", "I32", 1, two);
    safetensors_declare(&w, "bytes", "U8", 1, three);
    safetensors_begin(&w, &alone);
    safetensors_write_at(&w, 0, 1, longs + 1, 2);
    safetensors_write_at(&w, 0, 0, longs, 1);
    safetensors_write_at(&w, 1, 0, ints, 2);
    safetensors_write_at(&w, 2, 0, "\xFF\0z", 3);
    safetensors_finish(&w, &alone);
    Safetensors *st = safetensors_open(ST_PATH, "");
    const SafetensorsEntry *l = safetensors_require(st, "longs", 1, three);
    const SafetensorsEntry *i = safetensors_require(st, "ints", 1, two);
    const SafetensorsEntry *b = safetensors_require(st, "bytes", 1, three);
    CHECK(strcmp(l->dtype, "I64") == 0 && memcmp(st->data + l->offset, longs, 24) == 0);
    CHECK(strcmp(i->dtype, "I32") == 0 && memcmp(st->data + i->offset, ints, 8) == 0);
    CHECK(strcmp(b->dtype, "U8") == 0 && memcmp(st->data + b->offset, "\xFF\0z", 3) == 0);
    static const char notes[] = "{\"__metadata__\":{\"format\":\"pt\",\"made of\":\"a \\\"b\\\"\\n\\\\x41\","
                                "\"empty\":\"\"},\"longs\"";
    CHECK(memcmp(st->data + 8, notes, sizeof(notes) - 1) == 0);
    safetensors_close(st);
}

static void st_declare_unknown(void *dtype) {
    const int64_t one[1] = {1};
    SafetensorsWriter w;
    safetensors_writer_open(&w, ST_PATH);
    safetensors_declare(&w, "x", (const char *)dtype, 1, one);
}

static void test_safetensors_many(void) {
    enum { MANY = 10000 };
    const int64_t one[1] = {1};
    char name[64];
    int wrong = 0;
    Ranks alone = silent_rank(0, 1);
    SafetensorsWriter w;
    safetensors_writer_open(&w, ST_PATH);
    for (int i = 0; i < MANY; i++) {
        check_format(name, sizeof(name), "model.layers.%d.mlp.weight", i);
        safetensors_declare(&w, name, i % 2 ? "F32" : "BF16", 1, one);
    }
    safetensors_begin(&w, &alone);
    for (int i = 0; i < MANY; i++) {
        float x = (float)(i % 256);
        safetensors_write_at(&w, (size_t)i, 0, &x, 1);
    }
    safetensors_finish(&w, &alone);
    Safetensors *st = safetensors_open(ST_PATH, "");
    for (int i = 0; i < MANY; i++) {
        float x = -1.0f;
        check_format(name, sizeof(name), "model.layers.%d.mlp.weight", i);
        safetensors_read_f32(st, safetensors_require(st, name, 1, one), &x);
        wrong += x != (float)(i % 256);
    }
    CHECK(st->count == MANY && wrong == 0);
    safetensors_close(st);
}

// ----------------------------------------------------------------------------
// files by hand

// n: the header's length as the file states it
static void st_write_raw(uint64_t n, const char *header, const void *data, size_t size) {
    FILE *file = check_fopen(ST_PATH, "wb", "");
    check_fwrite(&n, 8, 1, file, ST_PATH);
    check_fwrite(header, 1, strlen(header), file, ST_PATH);
    check_fwrite(data, 1, size, file, ST_PATH);
    check_fclose(file, ST_PATH);
}

// values at odd addresses, names in another order, an unknown key, an unknown dtype
static void test_safetensors_foreign(void) {
    const char *header = "{\"d\":{\"data_offsets\":[1,17],\"extra\":[{}],\"shape\":[2],\"dtype\":\"F64\"},"
                         "\"h\":{\"dtype\":\"F16\",\"shape\":[1,2],\"data_offsets\":[17,21]},"
                         "\"i\":{\"dtype\":\"NEW\",\"shape\":[7],\"data_offsets\":[0,1]}}";
    unsigned char data[21] = {0};
    double values[2] = {1.0 / 3.0, -1e300};
    uint16_t halves[2] = {0x3C00, 0xC500};
    float y[2];
    memcpy(data + 1, values, 16);
    memcpy(data + 17, halves, 4);
    st_write_raw(strlen(header), header, data, sizeof(data));
    CHECK(strlen(header) % 2 == 0);
    Safetensors *st = safetensors_open(ST_PATH, "");
    safetensors_read_f32(st, safetensors_find(st, "d"), y);
    CHECK(y[0] == 1.0f / 3.0f && y[1] == -INFINITY);
    safetensors_read_f32(st, safetensors_find(st, "h"), y);
    CHECK(y[0] == 1.0f && y[1] == -5.0f);
    CHECK(safetensors_find(st, "i") != NULL); // an unknown dtype matters only to who reads it
    safetensors_close(st);
}

static void test_safetensors_huge(void) {
    const char *header = "{\"a\":{\"dtype\":\"U8\",\"shape\":[5000000000],\"data_offsets\":[0,5000000000]},"
                         "\"b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[5000000000,5000000016]}}";
    const int64_t shape[1] = {4};
    float x[4] = {1, 2, 3, 4}, y[4];
    st_write_raw(strlen(header), header, "", 0);
    int file = open(ST_PATH, O_WRONLY);
    off_t end = (off_t)(8 + strlen(header)) + 5000000000; // sparse: takes no room
    int written = ftruncate(file, end + 16) == 0 && pwrite(file, x, 16, end) == 16;
    close(file);
    if (!written) {
        skip_case("safetensors beyond 4 GB: the file system has no such files");
    } else {
        Safetensors *st = safetensors_open(ST_PATH, "");
        safetensors_read_f32(st, safetensors_require(st, "b", 1, shape), y);
        CHECK(memcmp(x, y, 16) == 0);
        safetensors_close(st);
    }
    unlink(ST_PATH);
}

static void st_open(void *path) {
    safetensors_close(safetensors_open((const char *)path, "make sample"));
}

typedef struct {
    const char *message;
    const char *header; // followed by 16 bytes of data
} SafetensorsCase;

static const SafetensorsCase st_damaged[] = {
    {"contradict", "{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,16]}}"},
    {"contradict", "{\"a\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[0,16]}}"},
    {"contradict", "{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,16]}}"},
    {"contradict", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,16]}}"},
    {"contradict", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387908],\"data_offsets\":[0,16]}}"},
    {"contradict", "{\"a\":{\"dtype\":\"NEW\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,16]}}"},
    {"is not a size", "{\"a\":{\"dtype\":\"F32\",\"shape\":[-4],\"data_offsets\":[0,16]}}"},
    {"is not a size", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4.0],\"data_offsets\":[0,16]}}"},
    {"is not a size", "{\"a\":{\"dtype\":\"F32\",\"shape\":[9223372036854775808],\"data_offsets\":[0,16]}}"},
    {"at most 8 dimensions",
     "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,16]}}"},
    {"at most 8 dimensions", "{\"a\":{\"dtype\":\"F32\",\"shape\":4,\"data_offsets\":[0,16]}}"},
    {"at most 8 dimensions", "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,16]}}"},
    {"has no dtype", "{\"a\":{\"shape\":[4],\"data_offsets\":[0,16]}}"},
    {"has no dtype", "{\"a\":{\"dtype\":32,\"shape\":[4],\"data_offsets\":[0,16]}}"},
    {"needs data_offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4]}}"},
    {"needs data_offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16]}}"},
    {"needs data_offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16,16]}}"},
    {"needs data_offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,\"16\"]}}"},
    {"needs data_offsets",
     "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,99999999999999999999]}}"},
    {"lie outside", "{\"a\":{\"dtype\":\"F32\",\"shape\":[5],\"data_offsets\":[0,20]}}"},
    {"lie outside", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[-16,0]}}"},
    {"lie outside", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,0]}}"},
    {"lie outside", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,9223372036854775807]}}"},
    {"lie outside",
     "{\"a\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[9223372036854775807,9223372036854775807]}}"},
    {"overlaps", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
                 "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}"},
    {"overlaps", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
                 "\"b\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}"},
    {"follows a gap", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}"},
    {"follows a gap", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
                      "\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}"},
    {"its tensors end at", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}"},
    {"its tensors end at", "{}"},
    {"two tensors named a", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
                            "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}"},
    {"distinct names", "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}"},
    {"not described by an object", "{\"a\":[0,16]}"},
    {"zero byte", "{\"a\\u0000\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}"},
    {"header: line 1, column 13", "{\"a\":{\"b\":1,}}"},
    {"another format", "[{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}]"},
    {"another format", " {}"},
};

static void test_safetensors_damaged(void) {
    char path[] = ST_PATH, absent[] = "build/test/absent.safetensors", folder[] = "build/test";
    float data[4] = {1, 2, 3, 4};
    for (size_t i = 0; i < sizeof(st_damaged) / sizeof(st_damaged[0]); i++) {
        st_write_raw(strlen(st_damaged[i].header), st_damaged[i].header, data, sizeof(data));
        if (!check_dies(1, st_damaged[i].message, st_open, path)) {
            printf("    %s\n", st_damaged[i].header);
        }
    }
    check_dies(1, "---> make sample", st_open, path);
    check_dies(1, ST_PATH " is not a good safetensors file", st_open, path);
    check_dies(1, "cannot open build/test/absent.safetensors", st_open, absent);
    check_dies(1, "not a regular file", st_open, folder);
}

// stated lengths of a header that has 2 bytes in a file of 10
static void test_safetensors_lengths(void) {
    const uint64_t lengths[] = {0,          1,          3,          100000001,     1ull << 31,
                                1ull << 32, 1ull << 63, UINT64_MAX, UINT64_MAX - 7};
    char path[] = ST_PATH;
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        st_write_raw(lengths[i], "{}", "", 0);
        check_dies(1, "truncated, or another format", st_open, path);
    }
    st_write_raw(2, "{}", "", 0);
    CHECK(run_in_child(st_open, path, NULL, 0) == 0); // no tensor: allowed
    CHECK(truncate(ST_PATH, 7) == 0);
    check_dies(1, "it has 7 bytes", st_open, path);
    CHECK(truncate(ST_PATH, 0) == 0);
    check_dies(1, "it is empty", st_open, path);
}

// a header within the file, but longer than the format allows
static void test_safetensors_long_header(void) {
    char path[] = ST_PATH;
    st_write_raw(SAFETENSORS_MAX_HEADER + 1, "{", "", 0);
    if (truncate(ST_PATH, SAFETENSORS_MAX_HEADER + 9) == 0) {
        check_dies(1, "truncated, or another format", st_open, path);
    }
}

// a good file cut anywhere is refused
static void test_safetensors_truncated(void) {
    char path[] = ST_PATH;
    float x[105];
    fill_uniform(x, 105, 1, 3.0f);
    st_write_sample(x);
    struct stat status;
    CHECK(stat(ST_PATH, &status) == 0);
    for (off_t size = status.st_size - 1; size > 0; size -= 1 + size / 8) {
        CHECK(truncate(ST_PATH, size) == 0);
        check_dies(1, "is not a good safetensors file", st_open, path);
    }
}

// ----------------------------------------------------------------------------
// misuse and faults

static void st_require_absent(void *unused) {
    (void)unused;
    safetensors_require(safetensors_open(ST_PATH, "make train"), "w", 3, st_shape);
}

static void st_require_other_shape(void *unused) {
    (void)unused;
    safetensors_require(safetensors_open(ST_PATH, ""), "m", 2, st_shape);
}

static void st_read_beyond(void *unused) {
    float y[2];
    (void)unused;
    Safetensors *st = safetensors_open(ST_PATH, "");
    safetensors_read_f32_range(st, safetensors_find(st, "m"), 104, 2, y);
}

static void st_read_unknown(void *unused) {
    float y[7];
    (void)unused;
    Safetensors *st = safetensors_open(ST_PATH, "");
    safetensors_read_f32(st, safetensors_find(st, "i"), y);
}

// writes n values of a tensor of 4
static void st_write_values(void *n) {
    const float x[8] = {0};
    const int64_t shape[1] = {4};
    Ranks alone = silent_rank(0, 1);
    SafetensorsWriter w;
    safetensors_writer_open(&w, ST_PATH);
    safetensors_declare(&w, "w", "BF16", 1, shape);
    safetensors_begin(&w, &alone);
    safetensors_write_at(&w, 0, 0, x, *(size_t *)n);
    safetensors_finish(&w, &alone);
}

static void test_safetensors_misuse(void) {
    float x[105];
    size_t few = 3, many = 5;
    fill_uniform(x, 105, 1, 3.0f);
    st_write_sample(x);
    check_dies(1, "has no tensor w, expected with shape [3, 5, 7]\n  ---> make train", st_require_absent,
               NULL);
    check_dies(1, "tensor m has shape [3, 5, 7], expected [3, 5]", st_require_other_shape, NULL);
    check_dies(1, "read beyond the end of tensor m", st_read_beyond, NULL);
    check_dies(1, ST_PATH ": 6 bytes of its tensors were written, 8 were declared", st_write_values, &few);
    check_dies(1, "more values than declared for w", st_write_values, &many);
    safetensors_close(safetensors_open(ST_PATH, "")); // the sample is still there, whole
    test_safetensors_foreign();
    check_dies(1, "tensor i has dtype NEW, expected F32, BF16, F16 or F64", st_read_unknown, NULL);
}

// 1 MB to path, on a disk that takes no more than 64 KB
static void st_fill_disk(void *path) {
    const int64_t shape[1] = {262144};
    struct rlimit limit = {65536, 65536};
    float *x = NEW(float, 262144);
    setrlimit(RLIMIT_FSIZE, &limit);
    signal(SIGXFSZ, SIG_IGN);
    Ranks alone = silent_rank(0, 1);
    SafetensorsWriter w;
    safetensors_writer_open(&w, (const char *)path);
    safetensors_declare(&w, "w", "F32", 1, shape);
    safetensors_begin(&w, &alone);
    safetensors_write_at(&w, 0, 0, x, 262144);
    safetensors_finish(&w, &alone);
}

// ten thousand lines whose failures nobody looks at, on a disk that takes 1,000 bytes
static void st_print_lines(void *path) {
    struct rlimit limit = {1000, 1000};
    setrlimit(RLIMIT_FSIZE, &limit);
    signal(SIGXFSZ, SIG_IGN);
    NewFile file;
    newfile_open(&file, (const char *)path);
    for (int i = 0; i < 10000; i++) {
        fprintf(file.file, "line %d\n", i);
    }
    fseek(file.file, 0, SEEK_SET); // what is in the buffer at the end has room
    newfile_close(&file);
}

// a few bytes, to a device
static void st_print_line(void *path) {
    NewFile file;
    newfile_open(&file, (const char *)path);
    newfile_write(&file, "line\n", 1, 5);
    newfile_close(&file);
}

static void test_safetensors_full_disk(void) {
    char path[] = ST_PATH, device[] = "build/test/full", nowhere[] = "build/test/no/such/folder.safetensors";
    float x[105];
    fill_uniform(x, 105, 1, 3.0f);
    st_write_sample(x);
    check_dies(1, "cannot write " ST_PATH, st_fill_disk, path);
    CHECK(access(ST_PATH ".tmp", F_OK) != 0);
    Safetensors *st = safetensors_open(ST_PATH, ""); // the earlier file is untouched
    CHECK(st->count == 5);
    safetensors_close(st);
    check_dies(1, "cannot write " ST_PATH, st_print_lines, path);
    CHECK(symlink("/dev/full", device) == 0 ||
          errno == EEXIST); // a link: should a rename hit it, no device is lost
    check_dies(1, "cannot write build/test/full: No space left on device", st_print_line, device);
    CHECK(access("build/test/full.tmp", F_OK) != 0);
    unlink(device);
    check_dies(1, "---> make its folder", st_fill_disk, nowhere);
}

static void st_read_all(void *path) {
    Safetensors *st = safetensors_open((const char *)path, "");
    for (size_t i = 0; i < st->count; i++) {
        float *values = NEW(float, safetensors_num_elements(&st->entries[i]));
        safetensors_read_f32(st, &st->entries[i], values);
        free(values);
    }
    safetensors_close(st);
}

// what the fuzzer once found, and its seeds: read or refused
static void test_safetensors_fuzz_corpus(void) {
    glob_t found;
    CHECK(glob("dev/fuzz/corpus/safetensors/*", 0, NULL, &found) == 0);
    for (size_t i = 0; i < found.gl_pathc; i++) {
        char output[1024];
        int status = run_in_child(st_read_all, found.gl_pathv[i], output, sizeof(output));
        CHECK(status == 0 || (status == 1 && strncmp(output, "error: ", 7) == 0));
    }
    globfree(&found);
}

static void test_safetensors(void) {
    CHECK(system("mkdir -p build/test") == 0);
    test_safetensors_bf16();
    test_safetensors_f16();
    test_safetensors_round_trip();
    test_safetensors_integers();
    check_dies(1, "cannot be written as F16", st_declare_unknown, (void *)"F16");
    test_safetensors_many();
    test_safetensors_foreign();
    test_safetensors_huge();
    test_safetensors_damaged();
    test_safetensors_lengths();
    test_safetensors_long_header();
    test_safetensors_truncated();
    test_safetensors_misuse();
    test_safetensors_full_disk();
    test_safetensors_fuzz_corpus();
    unlink(ST_PATH);
}

#endif
