/* A stand-in for libnvidia-ml.so.1 whose GPUs are described by the text file $NVML_STUB_FILE, read anew at each call:
 *
 *     gpu UUID TOTAL USED RESERVED         bytes; `mig` instead of `gpu`: found by UUID only, as MIG devices are
 *     process UUID PID|self BYTES|unknown  a compute process on that device
 *     error FUNCTION CODE                  that function fails with an nvmlReturn_t
 *
 * Compiled with -DWITHOUT_V2_MEMORY, -DWITHOUT_V3_PROCESSES or -DWITHOUT_PROCESSES it is an older driver's library.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MAX_GPUS = 8, MAX_PROCESSES = 32, UUID_SIZE = 96 };

typedef unsigned long long bytes_t;
typedef struct { char uuid[UUID_SIZE]; int is_mig; bytes_t total, used, reserved; } gpu_t;
typedef struct { char uuid[UUID_SIZE]; unsigned pid; bytes_t used; } process_t;
typedef struct { bytes_t total, free, used; } memory_v1_t;
typedef struct { unsigned version; bytes_t total, reserved, free, used; } memory_v2_t;
typedef struct { unsigned pid; bytes_t used; unsigned gpu_instance, compute_instance; } process_info_t;

static int users = 0; /* nvmlInit minus nvmlShutdown */
static gpu_t gpus[MAX_GPUS];
static process_t processes[MAX_PROCESSES];
static int num_gpus, num_processes;
/* A handle is the UUID that it was asked for: the order of the file may change behind it. */
static char handles[MAX_GPUS][UUID_SIZE];

/* Read the file; the error wanted for `function`, or SUCCESS. */
static int load(const char *function) {
    char line[256], name[64], pid[32], value[32];
    int result = SUCCESS, code;
    const char *path = getenv("NVML_STUB_FILE");
    FILE *file = path ? fopen(path, "r") : NULL;
    num_gpus = num_processes = 0;
    if (!file) return UNINITIALIZED;
    while (fgets(line, sizeof line, file)) {
        gpu_t *gpu = &gpus[num_gpus];
        process_t *process = &processes[num_processes];
        if (sscanf(line, "%15s %95s %llu %llu %llu", name, gpu->uuid, &gpu->total, &gpu->used, &gpu->reserved) == 5) {
            gpu->is_mig = !strcmp(name, "mig");
            num_gpus++;
        } else if (sscanf(line, "process %95s %31s %31s", process->uuid, pid, value) == 3) {
            process->pid = strcmp(pid, "self") ? (unsigned)strtoul(pid, NULL, 10) : (unsigned)getpid();
            process->used = strcmp(value, "unknown") ? strtoull(value, NULL, 10) : ~0ULL;
            num_processes++;
        } else if (sscanf(line, "error %63s %d", name, &code) == 2 && !strcmp(name, function)) {
            result = code;
        }
    }
    fclose(file);
    return result;
}

#define ENTER(function)                          \
    do {                                         \
        int wanted = load(#function);            \
        if (wanted != SUCCESS) return wanted;    \
        if (users <= 0) return UNINITIALIZED;    \
    } while (0)

static int init(const char *function) {
    int wanted = load(function);
    if (wanted == SUCCESS) users++;
    return wanted;
}

int nvmlInit(void) { return init("nvmlInit"); }
int nvmlInit_v2(void) { return init("nvmlInit_v2"); }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return init("nvmlInitWithFlags"); }

int nvmlShutdown(void) {
    ENTER(nvmlShutdown);
    users--;
    return SUCCESS;
}

/* Not part of NVML: lets a test see whether every nvmlInit has met its nvmlShutdown. */
int stubUsers(void) { return users; }

const char *nvmlErrorString(int code) {
    return code == 15 ? "GPU is lost (stub)" : "error (stub)";
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    ENTER(nvmlDeviceGetCount_v2);
    *count = 0;
    for (int i = 0; i < num_gpus; i++) *count += !gpus[i].is_mig;
    return SUCCESS;
}

static int give_handle(int i, void **handle) {
    for (int k = 0; k < MAX_GPUS; k++) {
        if (!handles[k][0]) strcpy(handles[k], gpus[i].uuid);
        if (!strcmp(handles[k], gpus[i].uuid)) { *handle = handles[k]; return SUCCESS; }
    }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    ENTER(nvmlDeviceGetHandleByIndex_v2);
    for (int i = 0; i < num_gpus; i++)
        if (!gpus[i].is_mig && index-- == 0) return give_handle(i, handle);
    return INVALID_ARGUMENT;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    ENTER(nvmlDeviceGetHandleByUUID);
    for (int i = 0; i < num_gpus; i++)
        if (!strcmp(gpus[i].uuid, uuid)) return give_handle(i, handle);
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length) {
    ENTER(nvmlDeviceGetUUID);
    snprintf(uuid, length, "%s", (char *)handle);
    return SUCCESS;
}

static gpu_t *find(void *handle) {
    for (int i = 0; i < num_gpus; i++)
        if (!strcmp(gpus[i].uuid, handle)) return &gpus[i];
    return NULL;
}

int nvmlDeviceGetMemoryInfo(void *handle, memory_v1_t *memory) {
    ENTER(nvmlDeviceGetMemoryInfo);
    gpu_t *gpu = find(handle);
    if (!gpu) return NOT_FOUND;
    memory->total = gpu->total;
    memory->used = gpu->used + gpu->reserved;
    memory->free = gpu->total - memory->used;
    return SUCCESS;
}

#ifndef WITHOUT_V2_MEMORY
int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2_t *memory) {
    ENTER(nvmlDeviceGetMemoryInfo_v2);
    gpu_t *gpu = find(handle);
    if (!gpu) return NOT_FOUND;
    if (memory->version != (sizeof *memory | 2u << 24)) return INVALID_ARGUMENT;
    memory->total = gpu->total;
    memory->used = gpu->used;
    memory->reserved = gpu->reserved;
    memory->free = gpu->total - gpu->used - gpu->reserved;
    return SUCCESS;
}
#endif

#ifndef WITHOUT_PROCESSES
static int running_processes(void *handle, unsigned *count, process_info_t *infos) {
    unsigned room = *count, found = 0;
    for (int i = 0; i < num_processes; i++) {
        if (strcmp(processes[i].uuid, handle)) continue;
        if (infos && found < room) {
            infos[found].pid = processes[i].pid;
            infos[found].used = processes[i].used;
        }
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, process_info_t *infos) {
    ENTER(nvmlDeviceGetComputeRunningProcesses_v2);
    return running_processes(handle, count, infos);
}

#ifndef WITHOUT_V3_PROCESSES
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_info_t *infos) {
    ENTER(nvmlDeviceGetComputeRunningProcesses_v3);
    return running_processes(handle, count, infos);
}
#endif
#endif
