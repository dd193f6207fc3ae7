/* Runs an exported model with MXNet's C predict API alone.
 *
 *     predict model-symbol.json model-0000.params SIZE... < windows
 *
 * SIZE... are the widths of the states, in the order of the manifest. The input is a sequence of windows, each "T N" and
 * then T x N word ids, time step after time step; it goes on from the state of the window before, the first, and one of
 * another N, from zero. Printed are, a line each, the log-probabilities (T x N x V) of a window and then its new states.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <mxnet/c_api.h>
#include <mxnet/c_predict_api.h>

enum { MAX_STATES = 64 };

static void check(int code, const char* what) {
  if (code != 0) {
    fprintf(stderr, "%s: %s\n", what, MXGetLastError());
    exit(1);
  }
}

static void* allocate(size_t count, size_t size) {
  void* memory = calloc(count, size);
  if (memory == NULL) {
    fprintf(stderr, "out of memory\n");
    exit(1);
  }
  return memory;
}

/* The whole of a file, with a zero byte after it. */
static char* read_file(const char* path, int* size) {
  FILE* file = fopen(path, "rb");
  if (file == NULL || fseek(file, 0, SEEK_END) != 0) {
    perror(path);
    exit(1);
  }
  *size = (int)ftell(file);
  rewind(file);
  char* content = allocate((size_t)*size + 1, 1);
  if (fread(content, 1, (size_t)*size, file) != (size_t)*size) {
    perror(path);
    exit(1);
  }
  fclose(file);
  return content;
}

/* One output of the last step forward; the caller frees it. */
static float* output_of(PredictorHandle predictor, uint32_t index, uint32_t* size) {
  uint32_t *shape, num_dimensions;
  check(MXPredGetOutputShape(predictor, index, &shape, &num_dimensions), "MXPredGetOutputShape");
  *size = 1;
  for (uint32_t i = 0; i < num_dimensions; ++i) *size *= shape[i];
  float* values = allocate(*size, sizeof(float));
  check(MXPredGetOutput(predictor, index, values, *size), "MXPredGetOutput");
  return values;
}

static void print_line(const float* values, uint32_t size) {
  for (uint32_t i = 0; i < size; ++i) printf(i ? " %.9g" : "%.9g", values[i]);
  printf("\n");
}

int main(int argc, char** argv) {
  const uint32_t num_states = (uint32_t)argc - 3;
  if (argc < 4 || num_states > MAX_STATES) {
    fprintf(stderr, "usage: predict SYMBOL PARAMS SIZE... < windows\n");
    return 2;
  }
  int symbol_size, parameters_size;
  char* symbol = read_file(argv[1], &symbol_size);
  char* parameters = read_file(argv[2], &parameters_size);

  char names[MAX_STATES][16];
  const char* keys[MAX_STATES + 1] = {"tokens"};
  float* states[MAX_STATES] = {NULL};
  uint32_t state_sizes[MAX_STATES];
  for (uint32_t i = 0; i < num_states; ++i) {
    snprintf(names[i], sizeof(names[i]), "state_%u", i);
    keys[i + 1] = names[i];
  }

  PredictorHandle predictor = NULL;
  uint32_t length, num_streams, num_streams_before = 0;
  while (scanf("%u %u", &length, &num_streams) == 2) {
    /* Shapes of all inputs one after another, and where each begins: (T, N), then (1, N, H) for each state. */
    uint32_t dimensions[2 + 3 * MAX_STATES] = {length, num_streams}, starts[MAX_STATES + 2] = {0, 2};
    for (uint32_t i = 0; i < num_states; ++i) {
      const uint32_t shape[3] = {1, num_streams, (uint32_t)atoi(argv[i + 3])};
      memcpy(dimensions + 2 + 3 * i, shape, sizeof(shape));
      starts[i + 2] = starts[i + 1] + 3;
      if (num_streams != num_streams_before) {
        free(states[i]);
        state_sizes[i] = shape[1] * shape[2];
        states[i] = allocate(state_sizes[i], sizeof(float));
      }
    }
    num_streams_before = num_streams;
    if (predictor == NULL) {
      const int cpu = 1, device = 0;
      check(MXPredCreate(symbol, parameters, parameters_size, cpu, device, num_states + 1, keys, starts, dimensions,
                         &predictor), "MXPredCreate");
    } else {
      PredictorHandle reshaped;
      check(MXPredReshape(num_states + 1, keys, starts, dimensions, predictor, &reshaped), "MXPredReshape");
      check(MXPredFree(predictor), "MXPredFree");
      predictor = reshaped;
    }

    float* tokens = allocate((size_t)length * num_streams, sizeof(float));
    for (uint32_t i = 0; i < length * num_streams; ++i) {
      if (scanf("%f", &tokens[i]) != 1) {
        fprintf(stderr, "a window has fewer words than it says\n");
        return 1;
      }
    }
    check(MXPredSetInput(predictor, "tokens", tokens, length * num_streams), "MXPredSetInput");
    free(tokens);
    for (uint32_t i = 0; i < num_states; ++i)
      check(MXPredSetInput(predictor, keys[i + 1], states[i], state_sizes[i]), "MXPredSetInput");
    check(MXPredForward(predictor), "MXPredForward");

    uint32_t size;
    float* log_probs = output_of(predictor, 0, &size);
    print_line(log_probs, size);
    free(log_probs);
    for (uint32_t i = 0; i < num_states; ++i) {
      free(states[i]);
      states[i] = output_of(predictor, i + 1, &state_sizes[i]);
      print_line(states[i], state_sizes[i]);
    }
  }
  if (predictor != NULL) check(MXPredFree(predictor), "MXPredFree");
  /* MXNet's threads take a predictor apart after MXPredFree; a process that ends meanwhile may crash or hang. */
  check(MXNDArrayWaitAll(), "MXNDArrayWaitAll");
  return 0;
}
