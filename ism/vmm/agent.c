/* SPDX-License-Identifier: Apache-2.0
 *
 * The map agent: an LD_PRELOAD library of a QEMU process that is a vfio-user client of the device manager.
 *
 * QEMU maps a device's BAR once, from a placeholder memory file, and vfio-user has no message to change that. This
 * library learns where the placeholder was mapped and then serves the map channel (ism/vfio_user/map_channel_wire.py):
 * the manager names ranges of that window, the agent maps region files over them, and zero pages when they go.
 *
 * Owns: per vfio-user connection one SEQPACKET socket, one thread, and what is mapped inside that connection's window.
 * Never: touches memory outside a window, reads or writes memory inside one, keeps a descriptor it was sent,
 * allocates in a hook, writes to standard output, blocks a hook for longer than 2 s, or ends the process.
 *
 * How it starts: connect() to a UNIX path P tries P.map first and sends INTRODUCE there, so that the manager, which has
 * both connections of one process, knows that it may offer the BAR for mmap. Without a socket at P.map nothing happens.
 * HELLO names the window's length and the inode of the placeholder; the shared mapping of that file becomes the window.
 * Hence the manager must have HELLO's answer before it gives the placeholder to QEMU.
 *
 * Trust: this process is the guest's own VMM and the manager is trusted by the guest, yet every packet is checked. A
 * refused request changes nothing. Regions must be sealed against shrinking: no access may raise SIGBUS. A packet that
 * is no request ends the channel. However the channel ends, what is mapped stays: established connections go on
 * without the manager. Nobody can change the window after that, and there is no second channel for it.
 *
 * Read-only regions are private copy-on-write mappings: a store of the guest reaches nobody. Were they mapped without
 * PROT_WRITE, such a store would kill QEMU; so would a hole, hence zero pages instead of one.
 *
 * Costs a guest can cause: zero pages it writes to become memory of QEMU's, up to the window's length. With
 * `-overcommit mem-lock=on`, or a passed-through device that pins the guest's memory, all of it is allocated at once;
 * `mem-lock=on-fault` avoids the first.
 *
 * Concurrency: one lock guards the table; descriptors that arrive live only while it is held, so no fork copies one.
 * Whoever unmaps or maps over a window (device unplugged) ends its channel first: the agent never maps over what came
 * after. The counters `waiting` and `placed` spare all other mmap and munmap calls the lock.
 */

#undef _FILE_OFFSET_BITS /* else mmap is another name of mmap64, and both are defined here */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || !defined(__LP64__)
#error "the map agent is for 64-bit little-endian hosts"
#endif
#undef mmap64

enum { MAX_CHANNELS = 16, MAX_FDS = 253 /* the kernel's SCM_MAX_FD */, CONNECT_TIMEOUT_S = 2, STACK = 256 * 1024 };

/* The wire: ism/vfio_user/map_channel_wire.py */

enum { HELLO = 1, MAP = 2, UNMAP = 3, INTRODUCE = 6, REPLY = 0x8000 };
enum { VERSION = 1, RIGHT_READ = 1, RIGHT_WRITE = 2 };
static const uint64_t OFFSET_LIMIT = UINT64_C(1) << 63;

struct packet {
    uint16_t type, version;
    uint32_t sequence;
    uint64_t offset;      /* HELLO: page size */
    uint64_t length;      /* HELLO: of the window */
    uint64_t file_offset; /* HELLO: inode of the placeholder */
    uint32_t rights, status;
};
_Static_assert(sizeof(struct packet) == 40, "the packet has 40 bytes");

/* State */

enum state {
    FREE,    /* the slot is unused */
    OPEN,    /* introduced; no HELLO yet */
    WAITING, /* HELLO came; the placeholder is not mapped yet */
    PLACED,  /* the window is at `base` */
    OVER,    /* the window went away; the thread is about to end */
};

struct channel {
    enum state state;
    int fd; /* the socket; from OPEN on it is closed by the thread only */
    uint64_t page_size, length;
    dev_t device; /* of memory files */
    ino_t inode;  /* of the placeholder */
    char *base;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct channel channels[MAX_CHANNELS]; /* under the lock */
static atomic_uint waiting, placed;           /* channels in these states; written under the lock */

typedef int connect_function(int, const struct sockaddr *, socklen_t);
typedef void *mmap_function(void *, size_t, int, int, int, off_t);
typedef int munmap_function(void *, size_t);

static _Atomic(connect_function *) next_connect; /* NULL until the constructor ran */
static _Atomic(mmap_function *) next_mmap;
static _Atomic(munmap_function *) next_munmap;

__attribute__((format(printf, 1, 2))) static void complain(const char *format, ...)
{
    char line[320];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    (void)dprintf(STDERR_FILENO, "ism-agent: %s\n", line);
}

/* What the hooks stand on: the next library's functions, or the kernel as long as they are not known. */

static int real_connect(int fd, const struct sockaddr *address, socklen_t size)
{
    connect_function *next = atomic_load(&next_connect);
    return next ? next(fd, address, size) : (int)syscall(SYS_connect, fd, address, size);
}

static void *real_mmap(void *at, size_t length, int prot, int flags, int fd, off_t offset)
{
    mmap_function *next = atomic_load(&next_mmap);
    return next ? next(at, length, prot, flags, fd, offset)
                : (void *)syscall(SYS_mmap, at, length, prot, flags, fd, offset);
}

static int real_munmap(void *address, size_t length)
{
    munmap_function *next = atomic_load(&next_munmap);
    return next ? next(address, length) : (int)syscall(SYS_munmap, address, length);
}

/* The table; all of these under the lock. */

static void set_state(struct channel *channel, enum state state)
{
    if (channel->state == WAITING)
        atomic_fetch_sub(&waiting, 1);
    if (channel->state == PLACED)
        atomic_fetch_sub(&placed, 1);
    channel->state = state;
    if (state == WAITING)
        atomic_fetch_add(&waiting, 1);
    if (state == PLACED)
        atomic_fetch_add(&placed, 1);
}

static void free_slot(struct channel *channel)
{
    close(channel->fd);
    set_state(channel, FREE);
}

/* Map pages over a part of a window. 0 or an errno; after an error nothing may be mapped there. */
static int cover(char *at, size_t length, int flags, int fd, off_t offset)
{
    if (real_mmap(at, length, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, offset) == MAP_FAILED)
        return errno;
    (void)madvise(at, length, MADV_DONTFORK); /* only saves the helpers QEMU forks the work */
    return 0;
}

static int cover_with_zeros(char *at, size_t length)
{
    return cover(at, length, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

/* Requests. Each returns the status to answer; called under the lock. */

static int do_hello(struct channel *channel, const struct packet *request)
{
    const uint64_t page = request->offset, length = request->length, inode = request->file_offset;
    const uint64_t system_page = (uint64_t)sysconf(_SC_PAGESIZE);
    if (channel->state != OPEN || request->rights || inode == 0)
        return EINVAL;
    if (page < 4096 || (page & (page - 1)) || page > UINT64_C(1) << 40 || page % system_page)
        return EINVAL;
    if (length == 0 || length % page || length > OFFSET_LIMIT)
        return EINVAL;
    struct stat status;
    const int probe = memfd_create("ism-agent", MFD_CLOEXEC); /* inode numbers mean nothing without the device's */
    if (probe < 0)
        return errno;
    const int failed = fstat(probe, &status) ? errno : 0;
    close(probe);
    if (failed)
        return failed;
    for (int i = 0; i < MAX_CHANNELS; i++)
        if (channels[i].state == WAITING && channels[i].inode == inode)
            return EEXIST;
    channel->page_size = page;
    channel->length = length;
    channel->device = status.st_dev;
    channel->inode = inode;
    set_state(channel, WAITING);
    return 0;
}

static bool fits(const struct channel *channel, uint64_t offset, uint64_t length)
{
    if (channel->state == OPEN) /* before HELLO */
        return false;
    if (length == 0 || (offset | length) % channel->page_size)
        return false;
    return length <= channel->length && offset <= channel->length - length;
}

static int do_unmap(struct channel *channel, const struct packet *request)
{
    if (!fits(channel, request->offset, request->length) || request->file_offset || request->rights)
        return EINVAL;
    if (channel->state != PLACED)
        return ENODEV;
    const int failed = cover_with_zeros(channel->base + request->offset, request->length);
    if (failed) {
        complain("zero pages: errno %d; the map channel ends", failed);
        set_state(channel, OVER);
    }
    return failed;
}

static int do_map(struct channel *channel, const struct packet *request, int fd)
{
    const uint64_t length = request->length, file_offset = request->file_offset;
    if (!fits(channel, request->offset, length))
        return EINVAL;
    if (file_offset % channel->page_size || file_offset > OFFSET_LIMIT - length)
        return EINVAL;
    if (request->rights == 0 || request->rights & ~(uint32_t)(RIGHT_READ | RIGHT_WRITE))
        return EINVAL;
    if (channel->state != PLACED)
        return ENODEV;
    /* Seals are never taken back, so what is read after this one is final. */
    const int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK))
        return EPERM;
    struct stat status;
    if (fstat(fd, &status))
        return errno;
    /* The device of the placeholder is that of all memory files with pages of the normal size: others may be sealed too,
       and still have no page for an access. */
    if (status.st_dev != channel->device)
        return EPERM;
    if (status.st_size < 0 || file_offset + length > (uint64_t)status.st_size)
        return EINVAL;
    char *const at = channel->base + request->offset;
    const int flags = request->rights & RIGHT_WRITE ? MAP_SHARED : MAP_PRIVATE | MAP_NORESERVE;
    const int failed = cover(at, length, flags, fd, (off_t)file_offset);
    /* The kernel may have taken away what was there before it failed. This msync only says whether there is a hole. */
    if (failed && msync(at, length, MS_ASYNC) && cover_with_zeros(at, length)) {
        complain("a region: errno %d, and no zero pages in its place; the map channel ends", failed);
        set_state(channel, OVER);
    }
    return failed;
}

static int do_request(struct channel *channel, const struct packet *request, const int *fds, size_t fd_count)
{
    const uint16_t type = request->type;
    if (type != HELLO && type != MAP && type != UNMAP)
        return ENOSYS; /* doorbells are the manager's: an eventfd in QEMU would ring nobody */
    if (fd_count != (type == MAP) || request->status)
        return EINVAL;
    if (type == HELLO)
        return do_hello(channel, request);
    return type == MAP ? do_map(channel, request, fds[0]) : do_unmap(channel, request);
}

/* The thread of a channel */

static void release(struct channel *channel)
{
    pthread_mutex_lock(&lock);
    free_slot(channel);
    pthread_mutex_unlock(&lock);
}

enum outcome { NOTHING, ANSWER, END };

/* Receive one packet, act on it, close what came with it. Under the lock. */
static enum outcome take_packet(struct channel *channel, struct packet *answer)
{
    if (channel->state == OVER)
        return END;
    struct packet request = {0};
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
    } control;
    struct iovec part = {.iov_base = &request, .iov_len = sizeof request};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    /* MSG_TRUNC: the size is the packet's, also when it is larger than the buffer */
    const ssize_t size = recvmsg(channel->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC | MSG_TRUNC);
    if (size < 0)
        return errno == EAGAIN || errno == EINTR ? NOTHING : END;

    int fds[MAX_FDS];
    size_t fd_count = 0;
    for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
        if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
            continue;
        const size_t bytes = head->cmsg_len - CMSG_LEN(0);
        for (size_t at = 0; at + sizeof(int) <= bytes && fd_count < MAX_FDS; at += sizeof(int))
            memcpy(&fds[fd_count++], CMSG_DATA(head) + at, sizeof(int));
    }

    enum outcome outcome = END;
    if (size == sizeof request && request.version == VERSION && !(request.type & REPLY)) {
        const bool lost = message.msg_flags & MSG_CTRUNC;
        const int status = lost ? EMFILE : do_request(channel, &request, fds, fd_count);
        *answer = (struct packet){.type = request.type | REPLY, .version = VERSION, .sequence = request.sequence};
        answer->status = (uint32_t)status;
        outcome = channel->state == OVER ? END : ANSWER;
    } else if (size > 0) {
        complain("the device manager sent a packet that is no request (%zd bytes); the map channel ends", size);
    }
    for (size_t i = 0; i < fd_count; i++)
        close(fds[i]);
    return outcome;
}

static void *serve(void *argument)
{
    struct channel *const channel = argument;
    const int fd = channel->fd;
    (void)pthread_setname_np(pthread_self(), "ism-agent");
    for (;;) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        if (poll(&ready, 1, -1) < 0 && errno != EINTR)
            break;
        struct packet answer;
        pthread_mutex_lock(&lock);
        const enum outcome outcome = take_packet(channel, &answer);
        pthread_mutex_unlock(&lock);
        if (outcome == END)
            break;
        if (outcome == NOTHING)
            continue;
        ssize_t sent;
        do /* waits for a manager that does not read; shutdown() ends the wait */
            sent = send(fd, &answer, sizeof answer, MSG_NOSIGNAL);
        while (sent < 0 && errno == EINTR);
        if (sent != sizeof answer)
            break;
    }
    release(channel);
    return NULL;
}

static void start(struct channel *channel)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    int failed = pthread_attr_init(&attributes);
    if (!failed) {
        (void)pthread_attr_setstacksize(&attributes, STACK);
        (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        failed = pthread_create(&thread, &attributes, serve, channel);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        pthread_attr_destroy(&attributes);
    }
    if (failed) {
        complain("no thread for the map channel: errno %d", failed);
        release(channel);
    }
}

/* connect() */

/* The path of the map socket beside the path that is connected to; false when there can be none. */
static bool map_path(int fd, const struct sockaddr *address, socklen_t size, struct sockaddr_un *result)
{
    static const char suffix[] = ".map";
    const size_t head = offsetof(struct sockaddr_un, sun_path);
    if (address == NULL || size <= head || size > sizeof *result || address->sa_family != AF_UNIX)
        return false;
    const char *const path = (const char *)address + head;
    const size_t length = strnlen(path, size - head);
    if (length == 0 || length + sizeof suffix > sizeof result->sun_path)
        return false; /* unnamed or abstract; or too long */
    if (length >= sizeof suffix - 1 && memcmp(path + length - (sizeof suffix - 1), suffix, sizeof suffix - 1) == 0)
        return false;
    int type = 0;
    socklen_t type_size = sizeof type;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &type_size) || type != SOCK_STREAM)
        return false;
    *result = (struct sockaddr_un){.sun_family = AF_UNIX};
    memcpy(result->sun_path, path, length);
    memcpy(result->sun_path + length, suffix, sizeof suffix);
    struct stat status;
    return stat(result->sun_path, &status) == 0 && S_ISSOCK(status.st_mode);
}

static int send_introduction(int fd, const struct sockaddr_un *address)
{
    const struct timeval limit = {.tv_sec = CONNECT_TIMEOUT_S}, none = {0};
    const struct packet introduction = {.type = INTRODUCE, .version = VERSION};
    int result, tries = 0;
    if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit))
        return errno;
    do
        result = real_connect(fd, (const struct sockaddr *)address, sizeof *address);
    while (result && errno == EINTR && ++tries < 8);
    if (result)
        return errno;
    if (send(fd, &introduction, sizeof introduction, MSG_NOSIGNAL) < 0)
        return errno;
    return setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &none, sizeof none) ? errno : 0;
}

/* A channel that has introduced this process, without its thread; NULL when there is none to be had. */
static struct channel *introduce(int fd, const struct sockaddr *address, socklen_t size)
{
    struct sockaddr_un beside;
    if (!map_path(fd, address, size, &beside))
        return NULL;
    struct channel *channel = NULL;
    int failed = EMFILE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_CHANNELS && channel == NULL; i++)
        if (channels[i].state == FREE)
            channel = &channels[i];
    if (channel) {
        const int made = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        failed = errno;
        if (made < 0) {
            channel = NULL;
        } else {
            *channel = (struct channel){.fd = made};
            set_state(channel, OPEN);
        }
    }
    pthread_mutex_unlock(&lock);
    if (channel) {
        failed = send_introduction(channel->fd, &beside);
        if (!failed)
            return channel;
        release(channel);
    }
    /* a socket nobody listens at, one that has just gone, one of another type: not the manager's */
    if (failed != ENOENT && failed != ECONNREFUSED && failed != EPROTOTYPE)
        complain("no map channel at %.200s: errno %d", beside.sun_path, failed);
    return NULL;
}

/* Windows come and go */

static void *place(void *at, size_t length, int fd, off_t offset)
{
    const int saved = errno;
    int failed = 0;
    bool unfit = false;
    struct stat status;
    if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_nlink == 0) {
        pthread_mutex_lock(&lock);
        for (int i = 0; i < MAX_CHANNELS; i++) {
            struct channel *const channel = &channels[i];
            if (channel->state != WAITING || channel->inode != status.st_ino || channel->device != status.st_dev)
                continue;
            unfit = length != channel->length || offset != 0;
            if (!unfit && (failed = cover_with_zeros(at, length)) == 0) {
                channel->base = at;
                set_state(channel, PLACED);
            }
            break;
        }
        pthread_mutex_unlock(&lock);
    }
    if (unfit)
        complain("the placeholder is mapped at %#jx for %#zx bytes, not as announced; left alone", (intmax_t)offset,
                 length);
    if (failed) { /* QEMU goes on without mapping the BAR */
        complain("zero pages for a window of %#zx bytes: errno %d", length, failed);
        real_munmap(at, length);
        errno = failed;
        return MAP_FAILED;
    }
    errno = saved;
    return at;
}

/* Somebody is about to change what is mapped at these addresses: no window may be there from now on. */
static void drop_windows(const void *address, size_t length)
{
    const int saved = errno;
    const uintptr_t from = (uintptr_t)address;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_CHANNELS; i++) {
        struct channel *const channel = &channels[i];
        const uintptr_t base = (uintptr_t)channel->base;
        const bool overlap = from < base ? length > base - from : length > 0 && from - base < channel->length;
        if (channel->state == PLACED && overlap) {
            set_state(channel, OVER);
            shutdown(channel->fd, SHUT_RDWR); /* wakes its thread */
        }
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
}

/* The hooks */

#define HOOK __attribute__((visibility("default")))

/* By another name, since <sys/socket.h> may declare connect() with a union in place of the pointer. */
HOOK int hooked_connect(int fd, const struct sockaddr *address, socklen_t size) __asm__("connect");

HOOK int hooked_connect(int fd, const struct sockaddr *address, socklen_t size)
{
    const int before = errno;
    struct channel *const channel = introduce(fd, address, size);
    errno = before;
    const int result = real_connect(fd, address, size);
    if (channel) {
        const int saved = errno;
        if (result == 0)
            start(channel);
        else
            release(channel);
        errno = saved;
    }
    return result;
}

HOOK void *mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
    if (flags & MAP_FIXED && atomic_load(&placed))
        drop_windows(address, length);
    void *const at = real_mmap(address, length, prot, flags, fd, offset);
    const int type = flags & MAP_TYPE;
    if (at == MAP_FAILED || fd < 0 || (type != MAP_SHARED && type != MAP_SHARED_VALIDATE) || !atomic_load(&waiting))
        return at;
    return place(at, length, fd, offset);
}

HOOK void *mmap64(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
    return mmap(address, length, prot, flags, fd, offset);
}

HOOK int munmap(void *address, size_t length)
{
    if (atomic_load(&placed))
        drop_windows(address, length);
    return real_munmap(address, length);
}

/* A forked child has no channel: its parent's stay the parent's. */

static void before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&lock);
}

static void after_fork_in_child(void)
{
    for (int i = 0; i < MAX_CHANNELS; i++)
        if (channels[i].state != FREE)
            free_slot(&channels[i]);
    pthread_mutex_unlock(&lock);
}

/* Copied as bytes: C has no conversion from an object's pointer to a function's. */
static void find_next(void *pointer, const char *name)
{
    void *const symbol = dlsym(RTLD_NEXT, name);
    memcpy(pointer, &symbol, sizeof symbol);
}

__attribute__((constructor)) static void load(void)
{
    connect_function *found_connect;
    mmap_function *found_mmap;
    munmap_function *found_munmap;
    find_next(&found_connect, "connect");
    find_next(&found_mmap, "mmap");
    find_next(&found_munmap, "munmap");
    atomic_store(&next_connect, found_connect);
    atomic_store(&next_mmap, found_mmap);
    atomic_store(&next_munmap, found_munmap);
    if (pthread_atfork(before_fork, after_fork, after_fork_in_child))
        complain("pthread_atfork failed: forked children hold map channels open");
}
