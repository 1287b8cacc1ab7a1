package server

import (
	"crypto/rand"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cryovisor/cryovisor/lifecycle"
)

// metrics are what Prometheus is told: the Manager's when it asks, and those of requests.
type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.CounterVec
	times    *prometheus.HistogramVec
	handler  http.Handler
}

func newMetrics(m *lifecycle.Manager) *metrics {
	metrics := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cryovisor_http_requests_total", Help: "Requests, by method, route and status.",
		}, []string{"method", "route", "status"}),
		times: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "cryovisor_http_request_seconds", Help: "How long requests took.", Buckets: bucketsOf(lifecycle.OperationBuckets),
		}, []string{"method", "route"}),
	}
	metrics.registry.MustRegister(metrics.requests, metrics.times, managerCollector{m})
	metrics.handler = promhttp.HandlerFor(metrics.registry, promhttp.HandlerOpts{})
	return metrics
}

// observe counts a request. Routes are few; what fits none is one of them.
func (m *metrics) observe(method string, seen *recorder, took time.Duration) {
	switch method {
	case "GET", "POST", "DELETE":
	default:
		method = "other"
	}
	m.requests.WithLabelValues(method, seen.route, strconv.Itoa(seen.status)).Inc()
	m.times.WithLabelValues(method, seen.route).Observe(took.Seconds())
}

func (s *Server) prometheus(w http.ResponseWriter, r *request) error {
	s.metrics.handler.ServeHTTP(w, r.Request)
	return nil
}

// managerCollector reads a Manager's metrics when it is asked for them.
type managerCollector struct{ m *lifecycle.Manager }

var (
	sandboxesDesc  = prometheus.NewDesc("cryovisor_sandboxes", "Sandboxes, by state.", []string{"state"}, nil)
	templatesDesc  = prometheus.NewDesc("cryovisor_templates", "Templates and checkpoints.", nil, nil)
	storedDesc     = prometheus.NewDesc("cryovisor_stored_bytes", "What all snapshots take on disk.", nil, nil)
	operationsDesc = prometheus.NewDesc("cryovisor_operation_seconds", "How long operations on sandboxes took.", []string{"operation"}, nil)
	failedDesc     = prometheus.NewDesc("cryovisor_operations_failed_total", "Operations on sandboxes that failed.", []string{"operation"}, nil)
	expiredDesc    = prometheus.NewDesc("cryovisor_expired_total", "Sandboxes whose retention has ended.", nil, nil)
	autoDesc       = prometheus.NewDesc("cryovisor_auto_pauses_total", "Pauses because of a timeout.", nil, nil)
	takenBackDesc  = prometheus.NewDesc("cryovisor_pauses_taken_back_total", "Pauses that a connection took back.", nil, nil)
	poolReadyDesc  = prometheus.NewDesc("cryovisor_pool_ready", "VMs that were made in advance and are ready.", nil, nil)
	poolUsesDesc   = prometheus.NewDesc("cryovisor_pool_uses_total", "Machines that found such a VM, and that did not.", []string{"found"}, nil)
)

// Describe implements prometheus.Collector.
func (c managerCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		sandboxesDesc, templatesDesc, storedDesc, operationsDesc, failedDesc, expiredDesc, autoDesc, takenBackDesc, poolReadyDesc, poolUsesDesc,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c managerCollector) Collect(ch chan<- prometheus.Metric) {
	m := c.m.Metrics()
	for _, state := range []lifecycle.State{
		lifecycle.StateRunning, lifecycle.StatePausing, lifecycle.StatePaused, lifecycle.StateResuming,
	} {
		ch <- prometheus.MustNewConstMetric(sandboxesDesc, prometheus.GaugeValue, float64(m.States[state]), string(state))
	}
	ch <- prometheus.MustNewConstMetric(templatesDesc, prometheus.GaugeValue, float64(m.Templates))
	ch <- prometheus.MustNewConstMetric(storedDesc, prometheus.GaugeValue, float64(m.StoredBytes))
	ch <- prometheus.MustNewConstMetric(expiredDesc, prometheus.CounterValue, float64(m.Expired))
	ch <- prometheus.MustNewConstMetric(autoDesc, prometheus.CounterValue, float64(m.AutoPauses))
	ch <- prometheus.MustNewConstMetric(takenBackDesc, prometheus.CounterValue, float64(m.TakenBack))
	ch <- prometheus.MustNewConstMetric(poolReadyDesc, prometheus.GaugeValue, float64(m.Pool.Ready))
	ch <- prometheus.MustNewConstMetric(poolUsesDesc, prometheus.CounterValue, float64(m.Pool.Taken), "yes")
	ch <- prometheus.MustNewConstMetric(poolUsesDesc, prometheus.CounterValue, float64(m.Pool.Missed), "no")
	for name, o := range map[string]lifecycle.Operation{"create": m.Creates, "pause": m.Pauses, "resume": m.Resumes, "kill": m.Kills} {
		ch <- prometheus.MustNewConstMetric(failedDesc, prometheus.CounterValue, float64(o.Failed), name)
		ch <- histogram(o, name)
	}
}

func histogram(o lifecycle.Operation, name string) prometheus.Metric {
	cumulative := make(map[float64]uint64)
	var count uint64
	for i, n := range o.Buckets {
		count += n
		if i < len(lifecycle.OperationBuckets) {
			cumulative[lifecycle.OperationBuckets[i].Seconds()] = count
		}
	}
	return prometheus.MustNewConstHistogram(operationsDesc, count, o.Total.Seconds(), cumulative, name)
}

func bucketsOf(bounds []time.Duration) []float64 {
	buckets := make([]float64, len(bounds))
	for i, d := range bounds {
		buckets[i] = d.Seconds()
	}
	return buckets
}

// requestID is the caller's, if it is harmless, or a new one.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-Id")
	if id == "" || len(id) > 64 {
		return rand.Text()
	}
	for _, c := range id {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return rand.Text()
		}
	}
	return id
}
