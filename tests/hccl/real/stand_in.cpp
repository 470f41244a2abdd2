// A stand-in for CANN under the real torch_npu: devices in host memory, streams that are threads, HCCL over TCP.
//
// Only what has to return something is here; build.sh makes everything else that torch_npu asks for return 0.
// Environment: STAND_IN_LOG=1 says on stderr what is called; STAND_IN_ASYNC_ERROR=1 reports a lost peer as HCCL's
// asynchronous error (otherwise the operation never ends, as on hardware until a timeout of its own).

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <unordered_map>

namespace {

using Status = int;
using Handle = void *;
constexpr Status kOk = 0, kNoDevice = 107002, kNoMemory = 207001, kTimeout = 9, kTcp = 11, kRemote = 21;
constexpr int kDevices = 4;
constexpr size_t kTotal = size_t(16) << 30;

void say(const char *format, ...) {
  static const bool wanted = getenv("STAND_IN_LOG") != nullptr;
  if (!wanted) return;
  char text[512];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  fprintf(stderr, "[stand-in %d] %s\n", getpid(), text);
}

// ---- streams: each a thread that works off its queue in order ----

struct Stream {
  std::mutex lock;
  std::condition_variable changed;
  std::deque<std::function<void()>> jobs;
  bool busy = false, ends = false;

  Stream() {
    std::thread([this] { work(); }).detach();
  }
  void work() {
    std::unique_lock<std::mutex> held(lock);
    for (;;) {
      changed.wait(held, [this] { return ends || !jobs.empty(); });
      if (jobs.empty()) break;
      auto job = std::move(jobs.front());
      jobs.pop_front();
      busy = true;
      held.unlock();
      job();
      held.lock();
      busy = false;
      changed.notify_all();
    }
    held.unlock();
    delete this;
  }
  void put(std::function<void()> job) {
    std::lock_guard<std::mutex> held(lock);
    jobs.push_back(std::move(job));
    changed.notify_all();
  }
  bool idle() {
    std::lock_guard<std::mutex> held(lock);
    return jobs.empty() && !busy;
  }
  void drain() {
    std::unique_lock<std::mutex> held(lock);
    changed.wait(held, [this] { return jobs.empty() && !busy; });
  }
  void end() {
    std::lock_guard<std::mutex> held(lock);
    ends = true;
    changed.notify_all();
  }
};

struct Event {
  std::mutex lock;
  std::condition_variable changed;
  uint64_t recorded = 0, reached = 0;

  bool over() {
    std::lock_guard<std::mutex> held(lock);
    return reached >= recorded;
  }
  void wait(uint64_t until) {
    std::unique_lock<std::mutex> held(lock);
    changed.wait(held, [&] { return reached >= until; });
  }
};

void on(Handle stream, std::function<void()> job) {
  if (stream == nullptr)
    job();
  else
    static_cast<Stream *>(stream)->put(std::move(job));
}

// ---- devices ----

thread_local int device = -1;
char contexts[kDevices];
std::atomic<size_t> used[kDevices];
std::mutex sizes_lock;
std::unordered_map<void *, std::pair<int, size_t>> sizes;

int here() { return device < 0 ? 0 : device; }

Status allocate(Handle *out, size_t nbytes) {
  *out = nullptr;
  if (posix_memalign(out, 512, nbytes ? nbytes : 512)) return kNoMemory;
  std::lock_guard<std::mutex> held(sizes_lock);
  sizes[*out] = {here(), nbytes};
  used[here()] += nbytes;
  return kOk;
}

Status release(Handle memory) {
  std::lock_guard<std::mutex> held(sizes_lock);
  auto found = sizes.find(memory);
  if (found != sizes.end()) {
    used[found->second.first] -= found->second.second;
    sizes.erase(found);
  }
  free(memory);
  return kOk;
}

// ---- HCCL ----

struct Root {
  char magic[8];
  int port;
};

struct Comm {
  int fd = -1, device = 0;
  uint32_t rank = 0;
  size_t reserved = 0;
  char name[128] = {};
  std::mutex lock;  // held while an operation touches a caller's memory
  std::condition_variable changed;
  bool destroyed = false;
  std::atomic<int> error{0};
};

thread_local int listener = -1;

bool move_all(Comm *comm, char *memory, size_t nbytes, bool out) {
  for (size_t done = 0; done < nbytes;) {
    pollfd ready{comm->fd, short(out ? POLLOUT : POLLIN), 0};
    poll(&ready, 1, 100);
    std::lock_guard<std::mutex> held(comm->lock);
    if (comm->destroyed) return false;
    ssize_t n = out ? send(comm->fd, memory + done, nbytes - done, MSG_NOSIGNAL | MSG_DONTWAIT)
                    : recv(comm->fd, memory + done, nbytes - done, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (n <= 0) return false;
    done += n;
  }
  return true;
}

void operate(Comm *comm, char *memory, size_t nbytes, bool out) {
  if (move_all(comm, memory, nbytes, out)) return;
  say("peer lost");
  if (getenv("STAND_IN_ASYNC_ERROR")) comm->error = kRemote;
  std::unique_lock<std::mutex> held(comm->lock);  // the operation never ends by itself
  comm->changed.wait(held, [comm] { return comm->destroyed; });
}

Status connect_pair(uint32_t ranks, const void *info, uint32_t rank, size_t buffer, Handle *out) {
  const Root *root = static_cast<const Root *>(info);
  if (ranks != 2 || memcmp(root->magic, "STANDIN", 8) != 0) return kTcp;
  const char *seconds = getenv("HCCL_CONNECT_TIMEOUT");
  auto comm = new Comm;
  comm->rank = rank;
  comm->device = here();
  comm->reserved = 2 * buffer;
  snprintf(comm->name, sizeof comm->name, "stand_in_%d", root->port);
  if (rank == 0) {
    pollfd ready{listener, POLLIN, 0};
    bool came = poll(&ready, 1, (seconds ? atoi(seconds) : 120) * 1000) > 0;
    if (came) comm->fd = accept(listener, nullptr, nullptr);
    close(listener);
    listener = -1;
    if (!came) {
      delete comm;
      return kTimeout;
    }
  } else {
    comm->fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(root->port);
    if (connect(comm->fd, reinterpret_cast<sockaddr *>(&address), sizeof address)) {
      close(comm->fd);
      delete comm;
      return kTcp;
    }
  }
  used[comm->device] += comm->reserved;
  say("communicator ready: rank %u of %u, buffer %zu MB", rank, ranks, buffer >> 20);
  *out = comm;
  return kOk;
}

size_t item_bytes(int type) {
  static const size_t table[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 16, 0, 1, 1, 1, 1};
  return table[type];
}

}  // namespace

extern "C" {

Status aclrtGetDeviceCount(uint32_t *count) {
  *count = kDevices;
  return kOk;
}
Status aclrtSetDevice(int index) {
  device = index;
  return kOk;
}
Status aclrtGetDevice(int *index) {
  if (device < 0) return kNoDevice;
  *index = device;
  return kOk;
}
Status aclrtGetCurrentContext(Handle *context) {
  *context = device < 0 ? nullptr : &contexts[device];
  return device < 0 ? kNoDevice : kOk;
}
Status aclrtSetCurrentContext(Handle context) {
  device = int(static_cast<char *>(context) - contexts);
  return kOk;
}
Status aclrtGetPrimaryCtxState(int, uint32_t *, int *active) {
  *active = 1;
  return kOk;
}
const char *aclrtGetSocName() { return "Ascend910B3"; }
const char *aclGetRecentErrMsg() { return ""; }

Status aclrtMalloc(Handle *out, size_t nbytes, int) { return allocate(out, nbytes); }
Status aclrtMallocAlign32(Handle *out, size_t nbytes, int) { return allocate(out, nbytes); }
Status aclrtMallocWithCfg(Handle *out, size_t nbytes, int, Handle) { return allocate(out, nbytes); }
Status aclrtFree(Handle memory) { return release(memory); }
Status aclrtMallocHost(Handle *out, size_t nbytes) { return posix_memalign(out, 512, nbytes ? nbytes : 512); }
Status aclrtMallocHostWithCfg(Handle *out, size_t nbytes, Handle) { return aclrtMallocHost(out, nbytes); }
Status aclrtFreeHost(Handle memory) {
  free(memory);
  return kOk;
}
Status aclrtGetMemInfo(int, size_t *free_bytes, size_t *total) {
  *free_bytes = kTotal - used[here()];
  *total = kTotal;
  return kOk;
}
Status aclrtMemcpy(Handle to, size_t, const void *from, size_t nbytes, int) {
  memmove(to, from, nbytes);
  return kOk;
}
Status aclrtMemcpyAsync(Handle to, size_t, const void *from, size_t nbytes, int, Handle stream) {
  on(stream, [=] { memmove(to, from, nbytes); });
  return kOk;
}
Status aclrtMemcpyAsyncWithCondition(Handle to, size_t room, const void *from, size_t nbytes, int kind, Handle stream) {
  return aclrtMemcpyAsync(to, room, from, nbytes, kind, stream);
}
Status aclrtMemset(Handle to, size_t, int value, size_t nbytes) {
  memset(to, value, nbytes);
  return kOk;
}
Status aclrtMemsetAsync(Handle to, size_t, int value, size_t nbytes, Handle stream) {
  on(stream, [=] { memset(to, value, nbytes); });
  return kOk;
}
Status aclrtPointerGetAttributes(const void *, Handle) { return 1; }

Status aclrtCreateStream(Handle *out) {
  *out = new Stream;
  return kOk;
}
Status aclrtCreateStreamWithConfig(Handle *out, uint32_t, uint32_t) { return aclrtCreateStream(out); }
Status aclrtDestroyStream(Handle stream) {
  static_cast<Stream *>(stream)->end();
  return kOk;
}
Status aclrtDestroyStreamForce(Handle stream) { return aclrtDestroyStream(stream); }
Status aclrtSynchronizeStream(Handle stream) {
  if (stream != nullptr) static_cast<Stream *>(stream)->drain();
  return kOk;
}
Status aclrtSynchronizeStreamWithTimeout(Handle stream, int) { return aclrtSynchronizeStream(stream); }
Status aclrtStreamQuery(Handle stream, int *status) {
  *status = stream == nullptr || static_cast<Stream *>(stream)->idle();
  return kOk;
}
Status aclrtStreamGetId(Handle, int *id) {
  *id = 1;
  return kOk;
}

Status aclrtCreateEvent(Handle *out) {
  *out = new Event;
  return kOk;
}
Status aclrtCreateEventWithFlag(Handle *out, uint32_t) { return aclrtCreateEvent(out); }
Status aclrtCreateEventExWithFlag(Handle *out, uint32_t) { return aclrtCreateEvent(out); }
Status aclrtRecordEvent(Handle handle, Handle stream) {
  auto event = static_cast<Event *>(handle);
  uint64_t number;
  {
    std::lock_guard<std::mutex> held(event->lock);
    number = ++event->recorded;
  }
  on(stream, [=] {
    std::lock_guard<std::mutex> held(event->lock);
    event->reached = number;
    event->changed.notify_all();
  });
  return kOk;
}
Status aclrtStreamWaitEvent(Handle stream, Handle handle) {
  auto event = static_cast<Event *>(handle);
  uint64_t until;
  {
    std::lock_guard<std::mutex> held(event->lock);
    until = event->recorded;
  }
  on(stream, [=] { event->wait(until); });
  return kOk;
}
Status aclrtSynchronizeEvent(Handle handle) {
  auto event = static_cast<Event *>(handle);
  event->wait(event->recorded);
  return kOk;
}
Status aclrtQueryEvent(Handle event, int *status) {
  *status = static_cast<Event *>(event)->over() ? 0 : 1;
  return kOk;
}
Status aclrtQueryEventStatus(Handle event, int *status) {
  *status = static_cast<Event *>(event)->over() ? 1 : 0;
  return kOk;
}
Status aclrtQueryEventWaitStatus(Handle, int *status) {
  *status = 0;
  return kOk;
}
Status aclrtEventElapsedTime(float *milliseconds, Handle, Handle) {
  *milliseconds = 0;
  return kOk;
}

Status aclrtGetDeviceSatMode(int *mode) {
  *mode = 1;
  return kOk;
}
Status aclrtDeviceCanAccessPeer(int *can, int, int) {
  *can = 1;
  return kOk;
}
Status aclrtGetSysParamOpt(int, int64_t *value) {
  *value = 0;
  return kOk;
}
size_t aclGetCompileoptSize(int) { return 32; }
Status aclGetCompileopt(int, char *value, size_t length) {
  memset(value, 0, length);
  strcpy(value, "disable");
  return kOk;
}
Status aclGetCannAttributeList(const void **, size_t *count) {
  *count = 0;
  return kOk;
}
Status aclGetCannAttribute(int, int *value) {
  *value = 1;
  return kOk;
}
Status aclsysGetCANNVersion(int, void *) { return 1; }
Status aclrtGetStreamResLimit(Handle, int, uint32_t *value) {
  *value = 20;
  return kOk;
}
Status aclGetDeviceCapability(uint32_t, int, int64_t *value) {
  *value = 20;
  return kOk;
}
Status aclrtGetDeviceInfo(uint32_t, int, int64_t *value) {
  *value = 20;
  return kOk;
}
Status aclmdlRICaptureGetInfo(Handle, int *status, Handle *model) {
  *status = 0;
  *model = nullptr;
  return kOk;
}
Status aclrtGetMemUsageInfo(int, Handle, size_t, size_t *count) {
  *count = 0;
  return kOk;
}
Status aclrtCheckArchCompatibility(const char *, int *can) {
  *can = 1;
  return kOk;
}
uint64_t MsprofGetHashId(const char *, size_t) { return 1; }
uint64_t MsprofSysCycleTime() { return 0; }
void aclAppLog(int, const char *, const char *, uint32_t, const char *, ...) {}

Status HcclGetRootInfo(void *info) {
  listener = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  if (bind(listener, reinterpret_cast<sockaddr *>(&address), length) || listen(listener, 4) ||
      getsockname(listener, reinterpret_cast<sockaddr *>(&address), &length))
    return kTcp;
  memset(info, 0, 4108);
  Root *root = static_cast<Root *>(info);
  memcpy(root->magic, "STANDIN", 8);
  root->port = ntohs(address.sin_port);
  return kOk;
}
Status HcclCommInitRootInfo(uint32_t ranks, const void *root, uint32_t rank, Handle *out) {
  return connect_pair(ranks, root, rank, size_t(200) << 20, out);
}
Status HcclCommInitRootInfoConfig(uint32_t ranks, const void *root, uint32_t rank, const void *config, Handle *out) {
  uint32_t megabytes = *reinterpret_cast<const uint32_t *>(static_cast<const char *>(config) + 24);
  return connect_pair(ranks, root, rank, size_t(megabytes) << 20, out);
}
Status HcclCommDestroy(Handle handle) {
  auto comm = static_cast<Comm *>(handle);
  std::lock_guard<std::mutex> held(comm->lock);
  if (comm->destroyed) return kOk;
  comm->destroyed = true;
  comm->changed.notify_all();
  shutdown(comm->fd, SHUT_RDWR);
  close(comm->fd);
  used[comm->device] -= comm->reserved;
  say("communicator destroyed");
  return kOk;  // never freed: operations on its stream may still look at it
}
Status HcclGetCommAsyncError(Handle comm, int *error) {
  *error = static_cast<Comm *>(comm)->error;
  return kOk;
}
const char *HcclGetErrorString(int) { return "the stand-in lost its peer"; }
Status HcclGetCommName(Handle comm, char *name) {
  strcpy(name, static_cast<Comm *>(comm)->name);
  return kOk;
}
uint32_t HcclGetCommConfigCapability() { return 12; }
Status HcclSend(Handle memory, uint64_t count, int type, uint32_t, Handle comm, Handle stream) {
  on(stream, [=] { operate(static_cast<Comm *>(comm), static_cast<char *>(memory), count * item_bytes(type), true); });
  return kOk;
}
Status HcclRecv(Handle memory, uint64_t count, int type, uint32_t, Handle comm, Handle stream) {
  on(stream, [=] { operate(static_cast<Comm *>(comm), static_cast<char *>(memory), count * item_bytes(type), false); });
  return kOk;
}

}  // extern "C"
